"""Makes background responses: what one job of a `JobRunner` does, from its lease to its last fact.

Everything goes to the response's log as it comes, so whoever gets the job after a crash goes on from the exact token:
what was retrieved is not retrieved again, and the engine reads the tokens that exist instead of making them anew. The
answer itself comes from `actors.answering`, like everybody's; when a failed attempt is tried again is `job_loop`'s.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Literal

import msgspec

from actors.answering import Answering
from actors.errors import CannotResume, DeadlineExceeded, FailedEverywhere, ShoalError, Unavailable
from actors.handles.model import ModelStream
from actors.policies.progress import Made
from actors.policies.prompting import question_of
from actors.policies.responses import (
    KIND,
    Began,
    Ended,
    Fact,
    ResponseTask,
    Said,
    Searched,
    Told,
    failed,
    finished,
    merged,
    told,
)
from actors.policies.retry import can_continue
from actors.policies.webhooks import EventType
from actors.rag import Context
from actors.stores.job_records import Lease, LeaseLost
from actors.stores.keys import AuthenticatedKey
from actors.stores.response_log import ResponseLog
from actors.telemetry import StageClock
from actors.types import GenerationCall, TokenDelta
from actors.webhooks import WebhookOutbox

Outcome = Literal["completed", "incomplete", "failed", "cancelled", "dead", "lost"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseJob:
    """A response and the right to write its log."""

    lease: Lease
    task: ResponseTask


class Responder:
    """Runs background responses; holds no state between them.

    Args:
        answering: makes answers.
        log: where they go.
        webhooks: tells of their ends.
    """

    kind = KIND
    subject = "this response"

    def __init__(self, answering: Answering, log: ResponseLog, webhooks: WebhookOutbox) -> None:
        self._answering = answering
        self._log = log
        self._webhooks = webhooks

    def task(self, lease: Lease) -> ResponseJob:
        """What a job asks for."""
        return ResponseJob(lease=lease, task=msgspec.convert(lease.payload, ResponseTask))

    async def run(self, tenant: str, job: ResponseJob) -> Outcome:
        """Answer, and finish the job with the answer's last fact.

        Raises:
            ShoalError: a part is down or full; another attempt goes on from here.
        """
        so_far = told(await self._log.read(tenant, job.lease.job_id))
        writer = _Writer(self._log, self._webhooks, job.lease, so_far.entries)
        try:
            return await self._answer(job, so_far, writer)
        except LeaseLost:
            return "lost"
        except (FailedEverywhere, CannotResume) as error:
            # It kills its replicas, or it was begun by a model that is not there any more: once more helps nobody.
            return await writer.bury(error.message)
        except ShoalError as error:
            if error.retryable:
                raise
            return await writer.end(failed(error, int(time.time())))

    async def give_up(self, tenant: str, job: ResponseJob, message: str) -> None:
        """End it as failed, and keep it among the dead letters."""
        entries = len(await self._log.read(tenant, job.lease.job_id))
        try:
            await _Writer(self._log, self._webhooks, job.lease, entries).bury(message)
        except LeaseLost:
            return

    async def _answer(self, job: ResponseJob, so_far: Told, writer: _Writer) -> Outcome:
        if not so_far.began:
            await writer.add(Began())
        call = _due(job)
        caller = AuthenticatedKey(
            principal=job.task.principal, limits=job.task.limits, tenant_limits=job.task.tenant_limits
        )
        clock = StageClock()
        context = await self._context(caller, call, so_far, writer, clock)
        call = _continued(call, so_far)
        try:
            stream = await self._answering.generate(caller, call, clock, context=context, requests=0)
            try:
                return await _write(stream, writer)
            finally:
                await stream.aclose()
        except DeadlineExceeded:
            if job.task.call.timeout_s is not None:
                raise
            raise Unavailable("it took longer than one attempt may; it goes on from here") from None

    async def _context(
        self,
        caller: AuthenticatedKey,
        call: GenerationCall,
        so_far: Told,
        writer: _Writer,
        clock: StageClock,
    ) -> Context:
        """What the documents say: once per response, whatever happens in between."""
        if call.retrieval is None:
            return Context()
        if so_far.searched is not None:
            return Context(passages=so_far.searched.passages, degraded=so_far.searched.degraded)
        context = await self._answering.context(caller.principal, call, clock)
        query = question_of(call.request.messages or ())
        await writer.add(Searched(query=query, passages=context.passages, degraded=context.degraded))
        return context


class _Writer:
    """Writes one log, as long as the lease is held."""

    def __init__(self, log: ResponseLog, webhooks: WebhookOutbox, lease: Lease, entries: int) -> None:
        self._log = log
        self._webhooks = webhooks
        self._lease = lease
        self._entries = entries

    async def add(self, *facts: Fact) -> None:
        self._entries = await self._log.append(self._lease, self._entries, facts)

    async def end(self, ended: Ended, *before: Fact) -> Outcome:
        """The last facts and the acknowledgement are one step."""
        await self._announce(ended)
        await self._log.append(self._lease, self._entries, (*before, ended), "done")
        return ended.status  # type: ignore[return-value]  # one of the statuses that end

    async def bury(self, message: str) -> Outcome:
        ended = Ended(status="failed", code="server_error", message=message, at=int(time.time()))
        await self._announce(ended)
        await self._log.append(self._lease, self._entries, (ended,), "dead", message)
        return "dead"

    async def _announce(self, ended: Ended) -> None:
        event: EventType = f"response.{ended.status}"  # type: ignore[assignment]  # cancelled is not its owner's
        await self._webhooks.announce(self._lease.tenant, event, f"resp_{self._lease.job_id}")


async def _write(stream: ModelStream, writer: _Writer) -> Outcome:
    """Write the answer as it comes. One write is under way at a time; what comes meanwhile is the next one's."""
    tail: list[TokenDelta] = []  # holds the finish reason, which may come before the usage
    async for delta in stream:
        deltas = [delta, *stream.take_ready()]
        ended = finished((*tail, *deltas), int(time.time()))
        tail = [one for one in deltas if one.finish_reason] or tail
        if ended is not None:
            return await writer.end(ended, Said(merged(deltas)))
        await writer.add(Said(merged(deltas)))
    raise Unavailable("the engine ended before the answer was complete")


def _continued(call: GenerationCall, so_far: Told) -> GenerationCall:
    """The call with what the log holds of its answer."""
    made = Made(call.request)
    for delta in so_far.deltas:
        made.add(delta)
    request = replace(call.request, progress=made.progress()) if made.tokens else call.request
    # What can only be made again and compared is written when it is complete: no reader sees a beginning of it.
    return replace(call, request=request, whole=not can_continue(call.request))


def _due(job: ResponseJob) -> GenerationCall:
    """The call with what is left of its time.

    Raises:
        DeadlineExceeded: nothing.
    """
    call = job.task.call
    if call.timeout_s is None:
        return call
    left_s = call.timeout_s - job.lease.age_s
    if left_s <= 0:
        raise DeadlineExceeded("the deadline passed before the answer was complete")
    return replace(call, timeout_s=left_s)
