"""One answer over as many replicas as it takes.

`Generation` takes a grant, starts the request on the named replica and passes the tokens on to the reader's
`TokenStream`. It remembers what the reader has got, so when the replica dies, falls silent or must give the slot
up, it comes back to the queue and another replica goes on from the exact token. Three attempts, then the reader
gets the error. Who runs next is the queue's decision; transport is `actors.handles.llm`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from actors import telemetry
from actors.errors import (
    CannotResume,
    ClientClosed,
    DeadlineExceeded,
    EngineFailed,
    Overloaded,
    ReplicaGone,
    ShoalError,
)
from actors.handles.call import detached
from actors.handles.llm import ReplicaPool, RunningStream
from actors.handles.queue import QueueClient
from actors.handles.token_stream import MOST_UNREAD_TOKENS, TokenStream
from actors.policies.decisions import Outcome
from actors.policies.retry import ATTEMPTS, can_continue
from actors.telemetry import StageClock
from actors.types import (
    FinishReason,
    GenerationRequest,
    Grant,
    Principal,
    Progress,
    Ticket,
    TokenDelta,
    Usage,
)

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


@dataclass(slots=True)
class _Choice:
    """What has come of one choice, over all attempts."""

    token_ids: list[int] = field(default_factory=list)
    text_chars: int = 0
    finish_reason: FinishReason | None = None

    def progress(self) -> Progress:
        return Progress(
            token_ids=tuple(self.token_ids),
            text_chars=max(self.text_chars, 0),
            finish_reason=self.finish_reason,
        )


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
        self._model, self._queue, self._pool = model.name, model.queue, model.pool
        self._request, self._admission, self._clock = request, admission, clock
        self._on_settled: OnSettled | None = on_settled
        loop = asyncio.get_running_loop()
        self._began_at = loop.time()
        self.expires_at = self._began_at + admission.timeout_s
        self._expiry = loop.call_at(self.expires_at, self._expire)
        self._choices = [_Choice() for _ in range(request.sampling.n)]
        if request.echo:
            for choice in self._choices:  # what is echoed is not the answer's text
                choice.text_chars = -len(request.prompt or "")
        self._attempts = 0  # that failed, and the one under way
        self._starts = 0
        self._current: Attempt | None = None
        self._again: asyncio.Task[None] | None = None

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
        current, self._current = self._current, None
        if current is not None:
            current.leave(outcome_of(error))
        if self._again is not None:
            self._again.cancel()  # it may wait in the queue, which hears of it
        self._finish(error, drop_unread=drop_unread)

    def preempt(self) -> None:
        """Give the slot up and come back to the queue with what there is."""
        current, self._current = self._current, None
        if current is not None:
            self._attempts -= 1  # nothing has failed
            current.leave("retried")
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
            attempt = Attempt(self, self._queue, grant)
            self._starts += 1
            try:
                async with asyncio.timeout_at(self.expires_at):
                    attempt.running = await self._pool.start(
                        grant.replica_id, self._continued(), self._starts, attempt
                    )
            except TimeoutError:
                attempt.leave("expired")
                raise DeadlineExceeded("the deadline passed before the answer was there") from None
            except ReplicaGone as error:
                attempt.leave("failed" if self._attempts >= ATTEMPTS else "retried")
                if self._attempts >= ATTEMPTS:
                    raise
                self._note("start_failed", error)
            except BaseException as error:
                attempt.leave(outcome_of(error) if isinstance(error, ShoalError) else "cancelled")
                raise
            else:
                if self.tokens.ended:  # it was stopped meanwhile
                    attempt.leave("expired")
                else:
                    self._current = attempt
                return

    def _ticket(self) -> Ticket:
        now = asyncio.get_running_loop().time()
        returning = self._starts > 0
        return Ticket(
            request_id=self._request.request_id,
            principal=self._admission.principal,
            prompt_tokens=self._admission.prompt_tokens + self._made_tokens(),
            predicted_output_tokens=self._admission.predicted_output_tokens,
            timeout_s=max(self.expires_at - now, 0.0),
            waited_s=now - self._began_at if returning else 0.0,
            attempt=self._attempts,
            sequences=self._request.sampling.n,
            returning=returning,
            preemptible=self._admission.whole or can_continue(self._request),
            prefix=self._admission.prefix,
        )

    def _continued(self) -> GenerationRequest:
        if not self._made_tokens():
            return self._request
        return replace(self._request, progress=tuple(choice.progress() for choice in self._choices))

    # --- what an attempt tells -----------------------------------------------------------------------

    def take(self, delta: TokenDelta) -> None:
        """A delta of the current attempt."""
        if self.ttft_s == 0.0:
            self.ttft_s = self._clock.elapsed_s()
        choice = self._choices[delta.choice]
        choice.token_ids += delta.token_ids
        choice.text_chars += len(delta.text)
        if delta.finish_reason is not None:
            choice.finish_reason = delta.finish_reason
        self.tokens.push(delta)
        if delta.usage is not None:
            self._current = None
            self._settle(delta.usage)
        elif self.tokens.unread_tokens > MOST_UNREAD_TOKENS and not self._admission.whole:
            slow = ClientClosed(f"more than {MOST_UNREAD_TOKENS} tokens of the answer were not read")
            self.stop(slow, drop_unread=True)

    def decoding(self) -> None:
        """The first delta of the current attempt has come."""
        self._clock.enter("decode")

    def failed(self, error: ShoalError) -> Outcome:
        """The current attempt failed; returns what its ticket has come to."""
        self._current = None
        unseen = self._admission.whole or not self.tokens.taken
        if isinstance(error, CannotResume) and unseen and self._attempts < ATTEMPTS:
            self._restart()
        elif not isinstance(error, ReplicaGone | EngineFailed) or self._attempts >= ATTEMPTS:
            self._finish(error)
            return "failed"
        self._note("attempt_failed", error)
        telemetry.count("shoal_resumed_total", model=self._model)
        self._go_on()
        return "retried"

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
        self._choices = [_Choice(text_chars=min(choice.text_chars, 0)) for choice in self._choices]

    # --- the end -------------------------------------------------------------------------------------

    def _expire(self) -> None:
        late = DeadlineExceeded("the deadline passed in the middle of the answer")
        if self._made_tokens() == 0:
            late = DeadlineExceeded("the deadline passed before the answer was there")
        self.stop(late, drop_unread=True)

    def _finish(self, error: ShoalError, *, drop_unread: bool = False) -> None:
        self.tokens.end(error, drop_unread=drop_unread)
        made = self._made_tokens()
        # What a caller gave up or let expire was made for them all the same; our own failures cost nothing.
        pays = made > 0 and isinstance(error, ClientClosed | DeadlineExceeded)
        self._settle(Usage(self._admission.prompt_tokens, made) if pays else None)

    def _settle(self, usage: Usage | None) -> None:
        self._expiry.cancel()
        on_settled, self._on_settled = self._on_settled, None
        if on_settled is not None:
            on_settled(usage)

    def _made_tokens(self) -> int:
        return sum(len(choice.token_ids) for choice in self._choices)

    def _note(self, action: str, error: ShoalError) -> None:
        _log.info(action, model=self._model, attempt=self._attempts, reason=error.message)


class Attempt:
    """One run on one replica, as the bus sees it; frees its grant exactly once."""

    __slots__ = ("_begun", "_generation", "_grant", "_over", "_queue", "_tokens", "running")

    def __init__(self, generation: Generation, queue: QueueClient, grant: Grant) -> None:
        self._generation = generation
        self._queue = queue
        self._grant = grant
        self._begun = False
        self._over = False
        self._tokens = 0
        self.running: RunningStream | None = None

    @property
    def ended(self) -> bool:
        """The engine is done with it, or it was left."""
        return self._over

    def push(self, delta: TokenDelta) -> None:
        """A delta from the bus."""
        if self._over:
            return
        if not self._begun:
            self._begun = True
            self._generation.decoding()
        self._tokens += len(delta.token_ids)
        if delta.usage is not None:
            self._free("answered")
        self._generation.take(delta)

    def end(self, error: ShoalError) -> None:
        """The bus or the engine failed."""
        if self._over:
            return
        self._over = True
        if isinstance(error, EngineFailed):
            self._queue.gone(self._grant.replica_id)  # its bus is open, but nothing more runs there
        outcome = self._generation.failed(error)
        self._queue.end(self._grant.request_id, outcome, self._tokens)

    def leave(self, outcome: Outcome) -> None:
        """Stop it in the engine; nothing happens when it is over."""
        if self._over:
            return
        self._free(outcome)
        if self.running is not None:
            self.running.cancel()

    def _free(self, outcome: Outcome) -> None:
        self._over = True
        self._queue.end(self._grant.request_id, outcome, self._tokens)


def outcome_of(error: ShoalError) -> Outcome:
    """How a ticket's life ended, by the error that ended it."""
    if isinstance(error, DeadlineExceeded):
        return "expired"
    if isinstance(error, Overloaded):
        return "refused"
    return "cancelled" if isinstance(error, ClientClosed) else "failed"
