"""One answer over as many replicas as it takes.

`Generation` takes a grant, starts the request on the named replica and passes the tokens on to the reader's
`TokenStream`. It remembers what the reader has got, so when the replica dies, falls silent or must give the slot
up, it comes back to the queue and another replica goes on from the exact token. Three attempts, then the reader
gets the error. A first token that is overdue is asked of a second replica as well, within a budget. Who runs next
is the queue's decision; transport is `actors.handles.llm`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace

from actors import telemetry
from actors.errors import (
    CannotResume,
    ClientClosed,
    DeadlineExceeded,
    EngineFailed,
    FailedEverywhere,
    ReplicaGone,
    ShoalError,
)
from actors.handles.attempt import Attempt, outcome_of
from actors.handles.call import detached
from actors.handles.llm import ReplicaPool
from actors.handles.queue import QueueClient
from actors.handles.token_stream import MOST_UNREAD_TOKENS, TokenStream
from actors.policies.decisions import Outcome
from actors.policies.hedging import Hedging
from actors.policies.progress import Made
from actors.policies.retry import ATTEMPTS, can_continue
from actors.telemetry import StageClock
from actors.types import GenerationRequest, Grant, Principal, PriorityClass, Ticket, TokenDelta, Usage

_log = telemetry.logger("generation")

OnSettled = Callable[[Usage | None], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Admission:
    """What the queue needs to know about a request."""

    principal: Principal
    prompt_tokens: int
    predicted_output_tokens: int  # per choice
    timeout_s: float  # for everything, the last token included
    whole: bool = False  # the answer is wanted when it is complete: nobody reads of it before
    prefix: tuple[int, ...] = ()  # see `Ticket`


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelAccess:
    """The ways to one model."""

    name: str
    queue: QueueClient
    pool: ReplicaPool
    hedging: Hedging


class Generation:
    """One request on its way; made and driven by `actors.handles.model`.

    Args:
        model: its queue gives grants, its pool reaches replicas.
        request: what to generate.
        admission: what the queue needs to know.
        clock: enters queue, prefill, decode and, behind the last token, other.
        on_settled: called once, with the tokens used, when no engine works on it any more; None: pay nothing.

    Attributes:
        tokens: what the reader reads.
        ttft_s: time to the first delta, on the request's clock.
        expires_at: its deadline, in the event loop's time.
    """

    def __init__(
        self,
        model: ModelAccess,
        request: GenerationRequest,
        admission: Admission,
        clock: StageClock,
        on_settled: OnSettled,
    ) -> None:
        self.tokens = TokenStream()
        self.ttft_s = 0.0
        self._access, self._model, self._queue = model, model.name, model.queue
        self._request, self._admission, self._clock = request, admission, clock
        self._on_settled: OnSettled | None = on_settled
        loop = asyncio.get_running_loop()
        self._began_at = loop.time()
        self.expires_at = self._began_at + admission.timeout_s
        self._expiry = loop.call_at(self.expires_at, self._expire)
        self._made = Made(request)
        self._attempts = 0  # that failed, and the one under way
        self._starts = 0
        self._starting = False  # it has a grant and is on its way to the replica
        self._unwanted = False  # it is to give up the slot to which it is on its way
        self._deaths = 0  # attempts in a row that failed after they had started, with no token between
        self._live: list[Attempt] = []  # on replicas: one, or two while a first token is overdue
        self._again: asyncio.Task[None] | None = None
        self._second: asyncio.Task[None] | None = None  # the start elsewhere
        self._overdue: asyncio.TimerHandle | None = None

    async def begin(self) -> None:
        """Return once the reader can have it: its first delta, or all of an answer that is wanted whole.

        Raises:
            ShoalError: it failed, and nobody has seen any of it.
        """
        try:
            await self._start()
            await self.tokens.wait()
            if self._admission.whole:
                await self.tokens.wait_for_end()
            if self.tokens.error is not None:
                raise self.tokens.error  # noqa: TRY301  whatever it is, the engine is to stop
        except BaseException as error:
            self.stop(error if isinstance(error, ShoalError) else ClientClosed("the client left"))
            raise

    def stop(self, error: ShoalError, *, drop_unread: bool = False) -> None:
        """End it wherever it is; the reader gets `error`. Nothing happens when it has ended."""
        if self.tokens.ended:
            return
        self._leave_all(outcome_of(error))
        for task in (self._again, self._second):
            if task is not None:
                task.cancel()  # it may wait in the queue, which hears of it
        self._finish(error, drop_unread=drop_unread)

    def preempt(self) -> None:
        """Give the slot up and come back to the queue with what there is."""
        if self._starting:
            self._unwanted = True
        elif self._live:
            self._attempts -= 1  # nothing has failed
            self._leave_all("retried")
            telemetry.count("shoal_preemptions_total", model=self._model)
            self._go_on()

    # --- one attempt ---------------------------------------------------------------------------------

    async def _start(self) -> None:
        """Take a grant and start there; a replica that cannot be started on costs an attempt."""
        while True:
            self._attempts += 1
            self._clock.enter("queue")
            grant = await self._queue.acquire(self._ticket())
            self._clock.enter("prefill")
            last = self._attempts >= ATTEMPTS
            self._starting, self._unwanted = True, False
            try:
                attempt = await self._run(grant, if_gone="failed" if last else "retried")
            except ReplicaGone as error:
                if last:
                    raise
                self._note("start_failed", error)
            else:
                self._watch_for_first_token(attempt)
                break
            finally:
                self._starting = False
        if self._unwanted:
            self.preempt()

    async def _run(self, grant: Grant, *, if_gone: Outcome) -> Attempt:
        """Start on the granted replica; frees the grant if that fails."""
        attempt = Attempt(self, self._queue, grant)
        self._starts += 1
        try:
            async with asyncio.timeout_at(self.expires_at):
                attempt.running = await self._access.pool.start(
                    grant.replica_id, self._continued(grant.request_id), self._starts, attempt
                )
        except TimeoutError:
            attempt.leave("expired")
            raise DeadlineExceeded("the deadline passed before the answer was there") from None
        except ReplicaGone:
            attempt.leave(if_gone)
            raise
        except BaseException as error:
            attempt.leave(outcome_of(error) if isinstance(error, ShoalError) else "cancelled")
            raise
        if self.tokens.ended:  # it was stopped meanwhile
            attempt.leave("expired")
        else:
            self._live.append(attempt)
        return attempt

    def _ticket(self) -> Ticket:
        now = asyncio.get_running_loop().time()
        returning = self._starts > 0
        return Ticket(
            request_id=self._request.request_id,
            principal=self._admission.principal,
            prompt_tokens=self._admission.prompt_tokens + self._made.tokens,
            predicted_output_tokens=self._admission.predicted_output_tokens,
            timeout_s=max(self.expires_at - now, 0.0),
            waited_s=now - self._began_at if returning else 0.0,
            attempt=self._attempts,
            sequences=self._request.sampling.n,
            returning=returning,
            preemptible=self._admission.whole or can_continue(self._request),
            suspect=self._deaths >= ATTEMPTS - 1,
            prefix=self._admission.prefix,
        )

    # --- a first token that is overdue ---------------------------------------------------------------

    def _watch_for_first_token(self, attempt: Attempt) -> None:
        delay_s = self._access.hedging.delay_s()
        batch = self._admission.principal.priority is PriorityClass.BATCH
        if delay_s is not None and not batch and self._starts == 1 and not self.tokens.ended:
            loop = asyncio.get_running_loop()
            self._overdue = loop.call_later(delay_s, self._hedge, attempt.replica_id)

    def _hedge(self, slow_replica: str) -> None:
        output_tokens = self._admission.predicted_output_tokens * self._request.sampling.n
        cost = self._admission.prompt_tokens + output_tokens
        if self._live and self._access.hedging.spend(cost):
            self._second = detached(self._start_twice(slow_replica))

    async def _start_twice(self, slow_replica: str) -> None:
        """The same request elsewhere, under a ticket of its own; who has the first token goes on alone."""
        ticket = self._ticket()
        second = replace(
            ticket,
            request_id=f"{ticket.request_id}#2",
            avoid=slow_replica,
            returning=False,
            preemptible=False,
        )
        try:
            grant = await self._queue.acquire(second)
            if not self._live:  # the first one failed meanwhile, and begins again by itself
                self._queue.end(grant.request_id, "cancelled")
                return
            await self._run(grant, if_gone="failed")
        except ShoalError as error:
            self._note("hedge_failed", error)
        else:
            telemetry.count("shoal_hedges_total", model=self._model)

    def _continued(self, ticket_id: str) -> GenerationRequest:
        """What is left to do, under the id that the replica's reports give it in the queue's books."""
        progress = self._made.progress() if self._made.tokens else ()
        if not progress and ticket_id == self._request.request_id:
            return self._request
        return replace(self._request, request_id=ticket_id, progress=progress)

    # --- what an attempt tells -----------------------------------------------------------------------

    def take(self, delta: TokenDelta) -> None:
        """A delta of the current attempt."""
        if self.ttft_s == 0.0:
            self.ttft_s = self._clock.elapsed_s()
        self._made.add(delta)
        self.tokens.push(delta)
        if delta.usage is not None:
            self._live.clear()
            self._access.hedging.earn(delta.usage.completion_tokens)
            self._settle(delta.usage)
        elif self.tokens.unread_tokens > MOST_UNREAD_TOKENS and not self._admission.whole:
            slow = ClientClosed(f"more than {MOST_UNREAD_TOKENS} tokens of the answer were not read")
            self.stop(slow, drop_unread=True)

    def decoding(self, attempt: Attempt, first_token_s: float) -> None:
        """The first delta of an attempt has come: it is the one that goes on."""
        self._clock.enter("decode")
        self._access.hedging.observe(first_token_s, self._admission.prompt_tokens)
        if self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None
        if self._second is not None:
            self._second.cancel()
        for other in [one for one in self._live if one is not attempt]:
            self._live.remove(other)
            other.leave("cancelled")

    def failed(self, attempt: Attempt, error: ShoalError) -> Outcome:
        """An attempt failed; returns what its ticket has come to."""
        self._live.remove(attempt)
        if self._live:
            return "cancelled"  # the other one goes on
        if isinstance(error, ReplicaGone | EngineFailed):
            # One that got on meanwhile has stood beside the request that kills.
            self._deaths = 1 if attempt.begun else self._deaths + 1
        if self._deaths >= ATTEMPTS:
            error = FailedEverywhere(f"{ATTEMPTS} replicas failed under this request: {error.message}")
        unseen = self._admission.whole or not self.tokens.taken
        if isinstance(error, CannotResume) and unseen and self._attempts < ATTEMPTS:
            self._restart()
        elif not isinstance(error, ReplicaGone | EngineFailed) or self._attempts >= ATTEMPTS:
            self._finish(error)
            return "failed"
        self._note("attempt_failed", error)
        telemetry.count("shoal_resumed_total", model=self._model)
        self._go_on()
        # The ticket of a second start does not come back: the request does, under its own.
        return "retried" if attempt.ticket_id == self._request.request_id else "failed"

    def _go_on(self) -> None:
        self._clock.enter("queue")
        self._again = detached(self._start_again())

    async def _start_again(self) -> None:
        try:
            await self._start()
        except ShoalError as error:
            self._finish(error)
        except Exception:  # a bug must reach the reader as an error, not as silence
            _log.exception("resume_broke", model=self._model)
            self._finish(ShoalError("internal error"))

    def _restart(self) -> None:
        """Begin from nothing: nobody has seen any of it, and no replica can go on behind it."""
        self.tokens.restart()
        self._made = Made(self._request)

    # --- the end -------------------------------------------------------------------------------------

    def _expire(self) -> None:
        late = DeadlineExceeded("the deadline passed in the middle of the answer")
        if self._made.tokens == 0:
            late = DeadlineExceeded("the deadline passed before the answer was there")
        self.stop(late, drop_unread=True)

    def _finish(self, error: ShoalError, *, drop_unread: bool = False) -> None:
        self.tokens.end(error, drop_unread=drop_unread)
        made = self._made.tokens
        # What a caller gave up or let expire was made for them all the same; our own failures cost nothing.
        pays = made > 0 and isinstance(error, ClientClosed | DeadlineExceeded)
        self._settle(Usage(self._admission.prompt_tokens, made) if pays else None)

    def _settle(self, usage: Usage | None) -> None:
        self._expiry.cancel()
        if self._overdue is not None:
            self._overdue.cancel()
        on_settled, self._on_settled = self._on_settled, None
        if on_settled is not None:
            on_settled(usage)

    def _leave_all(self, outcome: Outcome) -> None:
        live, self._live = self._live, []
        for attempt in live:
            attempt.leave(outcome)

    def _note(self, action: str, error: ShoalError) -> None:
        _log.info(action, model=self._model, attempt=self._attempts, reason=error.message)
