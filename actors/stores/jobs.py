"""The job log: durable work on a Redis stream, leased, renewed by heartbeat, run at least once.

The API enqueues before it answers; `actors.job_runner` leases and finishes. A lease is a promise for as long as
heartbeats come: a runner that stops sending them loses its jobs to another one, and its own late `finish` is
refused by the epoch. What a job means is its payload's business. The key schema stands in the scripts.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from pydantic import BaseModel, ConfigDict, Field
from redis.asyncio import Redis

from actors.errors import NotFound
from actors.stores.durable import DurableWrites
from actors.stores.job_records import Job, JobStats, Lease, LeaseBatch, job_of, lease_of
from actors.stores.redis import script, translated

GROUP = "runners"
DEAD_KEPT = 10_000
_SERIAL_RETRY_MS = 250


class JobLogConfig(BaseModel):
    """How long things last in the job log."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lease_s: float = Field(
        default=15.0, gt=0, description="Without a heartbeat for this long, a job is given to another runner."
    )
    keep_done_s: int = Field(default=86_400, ge=1, description="How long a finished job can be looked up.")
    idempotency_s: int = Field(default=86_400, ge=1, description="How long an idempotency key is remembered.")


class JobLog:
    """Jobs of every kind; each kind has a stream of its own.

    Args:
        redis: the client of `actors.stores.redis.connect`.
        config: how long things last.
        blocking: a client for `wait` alone, whose time-out is above the longest wait; runners give one.
        durable: how `enqueue` writes; none: a job is accepted once Redis has it in memory.
    """

    def __init__(
        self,
        redis: Redis,
        config: JobLogConfig | None = None,
        blocking: Redis | None = None,
        durable: DurableWrites | None = None,
    ) -> None:
        self._redis: Any = redis  # replies are bytes; the client's types allow more
        self._blocking = blocking or redis
        self._config = config or JobLogConfig()
        self._durable = durable or DurableWrites(redis, "memory")
        self._scripts = {
            name: script(redis, f"jobs_{name}")
            for name in ("enqueue", "lease", "heartbeat", "finish", "replay", "stats")
        }

    @property
    def lease_s(self) -> float:
        """How long a lease lasts without a heartbeat."""
        return self._config.lease_s

    @translated("the job log")
    async def enqueue(  # noqa: PLR0913  one argument per field of a job
        self,
        kind: str,
        tenant: str,
        payload: Mapping[str, Any],
        *,
        idempotency_key: str | None = None,
        serial: str = "",
        record: JobRecord | None = None,
    ) -> str:
        """Write a job and return its id; it is in the log when this returns.

        Args:
            kind: which runners take it.
            tenant: whose work it is.
            payload: what msgpack can hold.
            idempotency_key: of the tenant; used again, the first job's id is returned and nothing is written.
            serial: jobs of the tenant with the same value never run at the same time.
            record: what is written together with the job, and not at all when the key was used.

        Raises:
            Unavailable, StorageFull: it may or may not be in the log.
        """
        job_id = record.job_id if record is not None else uuid.uuid4().hex
        job = _NewJob(job_id, kind, tenant, payload, serial, idempotency_key, record)
        known = await self._enqueue(job)
        return str(known.decode())

    async def enqueue_in(
        self, pipe: Any, kind: str, tenant: str, payload: Mapping[str, Any], *, serial: str = ""
    ) -> str:
        """Queue the same on an open redis transaction, so that job and record appear together."""
        job = _NewJob(uuid.uuid4().hex, kind, tenant, payload, serial)
        await self._enqueue(job, pipe)
        return job.job_id

    @translated("the job log")
    async def lease(self, kind: str, consumer: str, count: int) -> LeaseBatch:
        """Take up to `count` jobs: due retries, then what dead runners left, then new ones.

        Raises:
            Unavailable: the log cannot be reached.
        """
        last, due_ms, drained, rows = await self._scripts["lease"](
            keys=[key_of(kind, "stream"), key_of(kind, "delayed")],
            args=[
                key_of(kind, ""),
                GROUP,
                consumer,
                count,
                self._lease_ms,
                _SERIAL_RETRY_MS,
            ],
        )
        return LeaseBatch(
            leases=[lease_of(kind, consumer, row) for row in rows],
            last_entry=last.decode(),
            due_in_s=None if int(due_ms) < 0 else int(due_ms) / 1e3,
            drained=bool(drained),
        )

    @translated("the job log")
    async def wait(self, kind: str, found: LeaseBatch, timeout_s: float) -> None:
        """Return when there is something new since `found`, something is due, or the time is up."""
        longest_s = timeout_s if found.due_in_s is None else min(timeout_s, found.due_in_s)
        block_ms = max(1, int(longest_s * 1e3))  # 0 would wait for ever
        await self._blocking.xread({key_of(kind, "stream"): found.last_entry}, count=1, block=block_ms)

    @translated("the job log")
    async def heartbeat(self, lease: Lease) -> bool:
        """Renew a lease; False when it is lost and the work must stop."""
        held = await self._scripts["heartbeat"](
            keys=[key_of(lease.kind, "stream"), _job_key(lease.kind, lease.job_id), _serial_key(lease)],
            args=[GROUP, lease.consumer, lease.entry, lease.epoch, self._lease_ms],
        )
        return bool(held)

    async def done(self, lease: Lease) -> bool:
        """Acknowledge a job as done; False when the lease was lost and nothing was written."""
        return await self._finish(lease, "done", self._config.keep_done_s)

    async def retry(self, lease: Lease, delay_s: float, error: str, *, unforeseen: bool = False) -> bool:
        """Give a job back, to be tried again after `delay_s`; False as above."""
        return await self._finish(lease, "retry", int(delay_s * 1e3), error, unforeseen=unforeseen)

    async def release(self, lease: Lease) -> bool:
        """Give a job back as it was: its runner stops, which is nobody's failure; False as above."""
        return await self._finish(lease, "release", 0)

    async def dead(self, lease: Lease, error: str) -> bool:
        """Give a job up: it stays readable among the dead letters; False as above."""
        return await self._finish(lease, "dead", 0, error)

    @translated("the job log")
    async def get(self, kind: str, tenant: str, job_id: str) -> Job:
        """Look a job up.

        Raises:
            NotFound: there is none of that id, or it is another tenant's.
        """
        fields = await self._redis.hgetall(_job_key(kind, job_id))
        if fields.get(b"tenant") != tenant.encode():
            raise NotFound(f"no such job: {job_id[:80]}")
        return job_of(job_id, fields)

    @translated("the job log")
    async def dead_letters(self, kind: str, count: int = 100) -> list[Job]:
        """The latest jobs that were given up, of all tenants, newest first."""
        ids = await self._redis.zrange(key_of(kind, "dead"), 0, count - 1, desc=True)
        found = [(one.decode(), await self._redis.hgetall(_job_key(kind, one.decode()))) for one in ids]
        return [job_of(job_id, fields) for job_id, fields in found if fields]

    @translated("the job log")
    async def dead_letter(self, kind: str, job_id: str) -> Job:
        """One job that was given up, whosever it is.

        Raises:
            NotFound: there is none of that id.
        """
        fields = await self._redis.hgetall(_job_key(kind, job_id))
        if fields.get(b"state") != b"dead":
            raise NotFound(f"no dead letter of kind {kind}: {job_id[:80]}")
        return job_of(job_id, fields)

    async def replay(self, kind: str, job_id: str) -> None:
        """Put a dead letter back into the log: it runs from its beginning, with all its attempts.

        Raises:
            NotFound: there is none of that id.
        """
        job = await self.dead_letter(kind, job_id)
        async with translated("the job log"):
            done = await self._scripts["replay"](
                keys=[
                    key_of(kind, "stream"),
                    _job_key(kind, job_id),
                    key_of(kind, "dead"),
                    record_of_job(kind, job.tenant, job_id),
                    key_of(kind, "log", job.tenant, job_id),
                ],
                args=[job_id],
            )
        if not done:
            raise NotFound(f"no dead letter of kind {kind}: {job_id[:80]}")

    @translated("the job log")
    async def stats(self, kind: str) -> JobStats:
        """Count what is not done."""
        entries, leased, delayed, age_ms = await self._scripts["stats"](
            keys=[key_of(kind, "stream"), key_of(kind, "delayed")], args=[GROUP]
        )
        return JobStats(
            waiting=max(0, int(entries) - int(leased)),
            leased=int(leased),
            delayed=int(delayed),
            oldest_age_s=int(age_ms) / 1e3,
        )

    @property
    def _lease_ms(self) -> int:
        return int(self._config.lease_s * 1e3)

    async def _enqueue(self, job: _NewJob, pipe: Any = None) -> Any:
        job_key = _job_key(job.kind, job.job_id)
        key = job.idempotency_key
        once = key_of(job.kind, "once", job.tenant, key) if key else job_key
        payload = msgspec.msgpack.encode(job.payload)
        record_key = record_of_job(job.kind, job.tenant, job.job_id) if job.record else job_key
        fields = [part for pair in (job.record.fields if job.record else {}).items() for part in pair]
        keys = [key_of(job.kind, "stream"), job_key, once, record_key]
        args = [job.job_id, job.tenant, payload, job.serial, self._config.idempotency_s, *fields]
        if pipe is None:
            return await self._durable.run(self._scripts["enqueue"], keys, args)
        return await self._scripts["enqueue"](keys=keys, args=args, client=pipe)

    @translated("the job log")
    async def _finish(
        self, lease: Lease, outcome: str, number: int, error: str = "", *, unforeseen: bool = False
    ) -> bool:
        done = await self._scripts["finish"](
            keys=[
                key_of(lease.kind, "stream"),
                _job_key(lease.kind, lease.job_id),
                _serial_key(lease),
                key_of(lease.kind, "delayed"),
                key_of(lease.kind, "dead"),
            ],
            args=[
                GROUP,
                lease.entry,
                lease.epoch,
                lease.job_id,
                outcome,
                number,
                error,
                DEAD_KEPT,
                int(unforeseen),
            ],
        )
        return bool(done)


@dataclass(frozen=True, slots=True)
class _NewJob:
    job_id: str
    kind: str
    tenant: str
    payload: Mapping[str, Any]
    serial: str
    idempotency_key: str | None = None
    record: JobRecord | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class JobRecord:
    """What is to be looked up of a job by its tenant, written in the same step as the job."""

    job_id: str
    fields: Mapping[str, bytes]


def key_of(kind: str, *parts: str) -> str:
    """A key of this kind of jobs: all of them lie in one slot of a cluster, as their scripts need."""
    return ":".join((f"shoal:{{jobs:{kind}}}", *parts))


def record_of_job(kind: str, tenant: str, job_id: str) -> str:
    """Key of the record beside a job; the tenant is part of it, so that nobody else's can be read."""
    return key_of(kind, "record", tenant, job_id)


def _job_key(kind: str, job_id: str) -> str:
    return key_of(kind, "job", job_id)


def _serial_key(lease: Lease) -> str:
    if not lease.serial:
        return _job_key(lease.kind, lease.job_id)
    return key_of(lease.kind, "serial", lease.tenant, lease.serial)
