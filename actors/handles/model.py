"""One model as a gateway uses it: a place in its queue, then tokens from the granted replica.

`ModelClient` joins the queue and the bus: it takes a grant, starts the request there, waits for the first
token and tries again elsewhere when the replica failed before it. `ModelStream` is what the caller reads. A
failure after the first token ends the stream with an error. Limits, retrieval and HTTP are the gateway's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from actors import telemetry
from actors.errors import ClientClosed, DeadlineExceeded, EngineFailed, ReplicaGone, ShoalError
from actors.handles.llm import ReplicaPool, RunningStream
from actors.handles.queue import QueueClient
from actors.handles.token_stream import TokenStream
from actors.policies.decisions import Outcome
from actors.telemetry import StageClock
from actors.types import GenerationRequest, Grant, ModelCard, Passage, Principal, Ticket, TokenDelta, Usage

_ATTEMPTS = 3
_log = telemetry.logger("model_client")

OnSettled = Callable[[Usage | None], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Admission:
    """What the queue needs to know about a request."""

    principal: Principal
    prompt_tokens: int
    predicted_output_tokens: int  # per choice
    timeout_s: float  # for everything, the last token included
    whole: bool = (
        False  # the answer is wanted when it is complete: until then another replica can begin again
    )


class ModelStream:
    """The deltas of one request; an async iterator. `aclose` cancels down to the engine.

    Attributes:
        request_id: of the request.
        passages: what the answer was given as context, best first; set by the gateway.
        headers: response headers that belong to the answer; set by the gateway.
        ttft_s: time to the first delta, on the request's clock.
    """

    def __init__(self, request_id: str, clock: StageClock, on_settled: OnSettled) -> None:
        self.request_id = request_id
        self.passages: Sequence[Passage] = ()
        self.headers: dict[str, str] = {}
        self.ttft_s = 0.0
        self._clock = clock
        self._on_settled = on_settled
        self._running: RunningStream | None = None
        self._expiry: asyncio.TimerHandle | None = None
        self._settled = False
        self._usage: Usage | None = None

    def __aiter__(self) -> ModelStream:
        return self

    async def __anext__(self) -> TokenDelta:
        delta = await self._tokens().__anext__()
        if delta.usage is not None:
            self._usage = delta.usage
            self._clock.enter("other")
        return delta

    def take_ready(self) -> list[TokenDelta]:
        """Deltas that have arrived already, without waiting; the iterator goes on behind them."""
        ready = self._tokens().take_ready()
        if ready and ready[-1].usage is not None:
            self._usage = ready[-1].usage
            self._clock.enter("other")
        return ready

    async def aclose(self) -> None:
        """Cancel what still runs. Safe to call twice and after the end."""
        self._stop(ClientClosed("the client left"))

    def began(self) -> None:
        """The first delta of an attempt has come."""
        self.ttft_s = self._clock.elapsed_s()
        self._clock.enter("decode")

    def attach(self, running: RunningStream, expires_at: float) -> None:
        """Begin: what its reader waits for is at hand. `expires_at` is in the loop's time."""
        self._running = running
        if running.tokens.ended:
            return
        loop = asyncio.get_running_loop()
        late = DeadlineExceeded("the deadline passed in the middle of the answer")
        self._expiry = loop.call_at(expires_at, self._stop, late)

    def settle(self, usage: Usage | None) -> None:
        """The engine is done with it, or never began: pay what was used, once."""
        if self._expiry is not None:
            self._expiry.cancel()
        if not self._settled:
            self._settled = True
            self._on_settled(usage)

    def _stop(self, error: ShoalError) -> None:
        if self._running is not None and not self._running.tokens.ended:
            self._running.cancel()
            self._running.tokens.end(error)

    def _tokens(self) -> TokenStream:
        if self._running is None:
            raise RuntimeError("the stream was read before it began")
        return self._running.tokens


class ModelClient:
    """One model, from one gateway.

    Args:
        name: the model's name, which is its Serve application's.
        gateway_id: this gateway replica.
        on_lost: called when the model's queue cannot be reached.
    """

    def __init__(self, name: str, gateway_id: str, on_lost: Callable[[], None]) -> None:
        self.name = name
        self._queue = QueueClient(name, gateway_id, on_lost)
        self._pool = ReplicaPool(name, gateway_id, self)

    @property
    def card(self) -> ModelCard | None:
        """What the model is; None until a replica has ever been there."""
        return self._queue.card

    async def wait_for_card(self, timeout_s: float) -> ModelCard | None:
        """The card, once known; None if that takes longer."""
        return await self._queue.wait_for_card(timeout_s)

    async def generate(
        self,
        request: GenerationRequest,
        admission: Admission,
        clock: StageClock,
        on_settled: OnSettled,
    ) -> ModelStream:
        """Queue, start and wait for the first delta, or for the last one of an answer that is wanted whole.

        Args:
            request: what to generate.
            admission: what the queue needs to know.
            clock: enters queue, prefill and decode.
            on_settled: called once with the tokens used, None if unknown, when the engine is done.

        Raises:
            Overloaded, DeadlineExceeded: from the queue.
            InvalidRequest: from the engine.
            Unavailable: three replicas failed under it.
        """
        stream = ModelStream(request.request_id, clock, on_settled)
        try:
            return await self._attempts(stream, request, admission, clock)
        except BaseException:
            stream.settle(None)
            raise

    async def _attempts(
        self, stream: ModelStream, request: GenerationRequest, admission: Admission, clock: StageClock
    ) -> ModelStream:
        loop = asyncio.get_running_loop()
        expires_at = loop.time() + admission.timeout_s
        waited_s = 0.0
        for attempt in range(1, _ATTEMPTS + 1):
            clock.enter("queue")
            ticket = Ticket(
                request_id=request.request_id,
                principal=admission.principal,
                prompt_tokens=admission.prompt_tokens,
                predicted_output_tokens=admission.predicted_output_tokens,
                timeout_s=max(expires_at - loop.time(), 0.0),
                waited_s=waited_s,
                attempt=attempt,
                sequences=request.sampling.n,
                returning=attempt > 1,
            )
            grant = await self._queue.acquire(ticket)
            clock.enter("prefill")
            try:
                running = await self._start(grant, request, stream, expires_at, whole=admission.whole)
            except (ReplicaGone, EngineFailed) as error:
                if attempt == _ATTEMPTS:
                    raise
                _log.info("attempt_failed", model=self.name, attempt=attempt, reason=error.message)
                waited_s = loop.time() - (expires_at - admission.timeout_s)
            else:
                stream.attach(running, expires_at)
                return stream
        raise AssertionError("the last attempt returns or raises")

    async def _start(
        self,
        grant: Grant,
        request: GenerationRequest,
        stream: ModelStream,
        expires_at: float,
        *,
        whole: bool,
    ) -> RunningStream:
        """Run on the granted replica until the reader can have it; frees the grant whatever happens."""
        begun = False

        def on_end(error: ShoalError | None) -> None:
            if isinstance(error, EngineFailed):
                self._queue.gone(grant.replica_id)  # its bus is open, but nothing more runs there
            # Before that another attempt may follow; then this one's outcome is told below.
            if begun or error is None:
                self._queue.end(grant.request_id, _outcome(error))
                stream.settle(running.tokens.usage)

        outcome: Outcome = "cancelled"
        try:
            async with asyncio.timeout_at(expires_at):
                running = await self._pool.start(grant.replica_id, request, on_end)
                await _ready(running, stream, whole=whole)
            begun = True
        except TimeoutError:
            outcome = "expired"
            raise DeadlineExceeded("the deadline passed before the answer was there") from None
        except (ReplicaGone, EngineFailed):
            outcome = "failed" if grant.attempt == _ATTEMPTS else "retried"
            raise
        except ShoalError as error:
            outcome = _outcome(error)
            raise
        else:
            return running
        finally:
            if not begun:
                self._queue.end(grant.request_id, outcome)

    def replica_lost(self, replica_id: str) -> None:
        """The bus broke: nothing more is to be granted there."""
        self._queue.gone(replica_id)

    def replica_draining(self, replica_id: str) -> None:
        """The replica has left the router: it finishes what it runs."""
        self._queue.gone(replica_id, draining=True)

    async def close(self) -> None:
        """End the connections."""
        self._pool.close()
        await self._queue.close()


async def _ready(running: RunningStream, stream: ModelStream, *, whole: bool) -> None:
    """Wait until the reader can have it; whatever else comes stops the request in the engine."""
    try:
        await running.tokens.wait()
        stream.began()
        if whole:
            await running.tokens.wait_for_end()
        if running.tokens.error is not None:  # nobody has seen any of it
            raise running.tokens.error  # noqa: TRY301  whatever it is, the engine is to stop
    except BaseException:
        running.cancel()
        raise


def _outcome(error: ShoalError | None) -> Outcome:
    if error is None:
        return "answered"
    if isinstance(error, DeadlineExceeded):
        return "expired"
    return "cancelled" if isinstance(error, ClientClosed) else "failed"
