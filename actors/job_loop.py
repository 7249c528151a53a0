"""Takes jobs of one kind from the log, keeps their leases alive, and decides what becomes of them.

The inside of `actors.job_runner.JobRunner`, which has one loop for each kind of work. What a job does is the work's:
`actors.ingestion`, `actors.responder`; after a failure, `actors.policies.ingestion` says whether and when it is tried
again.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from contextlib import suppress
from traceback import extract_tb
from typing import Any, Protocol

import msgspec
from pydantic import BaseModel, ConfigDict, Field

from actors import telemetry
from actors.errors import ShoalError, Unavailable
from actors.policies.ingestion import RetryPolicy, after_failure, unforeseen
from actors.stores.job_records import Lease, LeaseBatch
from actors.stores.jobs import JobLog

_OUTAGE_PAUSE_S = 1.0
_STUCK_AFTER_S = 60.0  # the loop turns every `poll_s`; this long without a turn, it hangs
_log = telemetry.logger("job_runner")


class JobLoopConfig(BaseModel):
    """How one runner works."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    concurrency: int = Field(default=2, ge=1, le=64, description="Jobs at the same time.")
    poll_s: float = Field(
        default=2.0, gt=0, le=30, description="Longest wait for new work before looking for left-over work."
    )
    max_deaths: int = Field(
        default=3, ge=1, description="Runners that may die with a job before it is given up."
    )
    max_failures: int = Field(
        default=5, ge=1, description="Attempts of a job that fail in a way that nobody foresaw."
    )
    give_up_after_s: float = Field(
        default=86_400, gt=0, description="How long a job waits for parts that are down."
    )


class Work(Protocol):
    """What jobs of one kind make happen."""

    @property
    def kind(self) -> str:
        """The job log's name for them."""

    @property
    def subject(self) -> str:
        """What a job does, in the words that tell a user that it will not be done."""

    def task(self, lease: Lease) -> Any:
        """What one job asks for.

        Raises:
            ValidationError: nothing that this version knows.
        """

    async def run(self, tenant: str, task: Any) -> str:
        """Do it, and say what came of it; any exception is a failed attempt.

        It may finish the job itself, together with its result; otherwise the loop does.
        """

    async def give_up(self, tenant: str, task: Any, message: str) -> None:
        """Show the user that it will not be done."""


class JobLoop:
    """Runs jobs until it is stopped.

    Args:
        jobs: the log; its blocking client's time-out must be above `poll_s`.
        work: what runs them; its kind of jobs is taken.
        config: see `JobLoopConfig`.
    """

    def __init__(self, jobs: JobLog, work: Work, config: JobLoopConfig) -> None:
        self._jobs = jobs
        self._work = work
        self._config = config
        self._policy = RetryPolicy(give_up_after_s=config.give_up_after_s, max_failures=config.max_failures)
        self._consumer = uuid.uuid4().hex
        self._active: dict[asyncio.Task[None], Lease] = {}
        self._loops: list[asyncio.Task[None]] = []
        self._turned_at = time.monotonic()

    @property
    def active(self) -> int:
        """Jobs that run here now."""
        return len(self._active)

    def start(self) -> None:
        """Begin to work; needs a running event loop."""
        self._turned_at = time.monotonic()
        self._loops = [asyncio.create_task(self._take_turns()), asyncio.create_task(self._keep_leases())]

    async def stop(self) -> None:
        """Stop at once and give the unfinished jobs back."""
        leases, tasks = list(self._active.values()), [*self._loops, *self._active]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for lease in leases:
            with suppress(ShoalError):  # then its lease ends by itself
                await self._jobs.release(lease)
        self._loops = []

    def drop(self, job_id: str) -> None:
        """Stop working on a job that was cancelled, if it runs here."""
        for task, lease in self._active.items():
            if lease.job_id == job_id:
                task.cancel()

    async def check_health(self) -> None:
        """Return while the loops turn. Redis being away is no fault of this actor.

        Raises:
            Unavailable: a loop ended or hangs; the actor should be replaced.
        """
        stuck = time.monotonic() - self._turned_at > _STUCK_AFTER_S
        if stuck or not self._loops or any(loop.done() for loop in self._loops):
            raise Unavailable("the job runner does not take jobs")

    # --- taking jobs ---------------------------------------------------------------------------------

    async def _take_turns(self) -> None:
        while True:
            self._turned_at = time.monotonic()
            free = self._config.concurrency - len(self._active)
            try:
                if free:
                    await self._take(free)
                else:
                    await asyncio.wait(
                        self._active, timeout=self._config.poll_s, return_when=asyncio.FIRST_COMPLETED
                    )
            except ShoalError as error:
                _log.warning("jobs_unreachable", error=error.message)
                await asyncio.sleep(_OUTAGE_PAUSE_S)

    async def _take(self, free: int) -> None:
        found = await self._jobs.lease(self._work.kind, self._consumer, free)
        for lease in found.leases:
            task = asyncio.create_task(self._run(lease))
            self._active[task] = lease
            task.add_done_callback(self._active.pop)
        if found.drained:
            await self._wait(found)

    async def _wait(self, found: LeaseBatch) -> None:
        # A job that ends frees a place, which is no reason to wake: there was nothing to take.
        await self._jobs.wait(self._work.kind, found, self._config.poll_s)

    async def _keep_leases(self) -> None:
        while True:
            await asyncio.sleep(self._jobs.lease_s / 4)
            for task, lease in list(self._active.items()):
                # When Redis does not answer, nobody else can take the job either: keep working.
                with suppress(ShoalError):
                    if not await self._jobs.heartbeat(lease) and not task.done():
                        _log.warning("lease_lost", job_id=lease.job_id)
                        task.cancel()

    # --- one job -------------------------------------------------------------------------------------

    async def _run(self, lease: Lease) -> None:
        try:
            task = self._work.task(lease)
        except msgspec.ValidationError:
            task = None
        try:
            if task is None:
                await self._jobs.dead(lease, "not a task that this version knows")
            else:
                await self._settle(lease, task)
        except ShoalError as error:
            # The log is away: the lease ends by itself, and the job is found again.
            _log.warning("job_not_settled", job_id=lease.job_id, error=error.message)
        except Exception as error:
            _log.error("job_not_settled", job_id=lease.job_id, error=type(error).__name__)

    async def _settle(self, lease: Lease, task: Any) -> None:
        if lease.deaths >= self._config.max_deaths:
            await self._give_up(lease, task, "its runner died each time")
            return
        started = time.monotonic()
        try:
            outcome = await self._work.run(lease.tenant, task)
        except Exception as error:
            await self._failed(lease, task, error)
            return
        await self._jobs.done(lease)
        telemetry.count("shoal_jobs_total", kind=self._work.kind, outcome=outcome)
        _log.info(
            "job_done",
            kind=self._work.kind,
            job_id=lease.job_id,
            outcome=outcome,
            seconds=round(time.monotonic() - started, 3),
        )

    async def _failed(self, lease: Lease, task: Any, error: Exception) -> None:
        surprise = unforeseen(error)
        delay_s = after_failure(
            error,
            failures=lease.unforeseen if surprise else lease.failures,
            age_s=lease.age_s,
            jitter=random.random(),
            policy=self._policy,
        )
        ours = isinstance(error, ShoalError)
        reason = error.message if isinstance(error, ShoalError) else type(error).__name__
        # Where a bug is, but not its message: that may repeat the document.
        where = (
            [] if ours else [f"{frame.filename}:{frame.lineno}" for frame in extract_tb(error.__traceback__)]
        )
        _log.warning("job_failed", job_id=lease.job_id, reason=reason, retry_in_s=delay_s, where=where[-8:])
        if delay_s is None:
            await self._give_up(lease, task, reason if ours else "an internal error")
        else:
            await self._jobs.retry(lease, delay_s, reason, unforeseen=surprise)

    async def _give_up(self, lease: Lease, task: Any, reason: str) -> None:
        await self._work.give_up(lease.tenant, task, f"{self._work.subject} was given up: {reason}")
        await self._jobs.dead(lease, reason)
        telemetry.count("shoal_jobs_total", kind=self._work.kind, outcome="dead")
        _log.error("job_dead", kind=self._work.kind, job_id=lease.job_id, reason=reason)
