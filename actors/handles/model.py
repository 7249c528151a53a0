"""One model as a gateway uses it: its queue, its pool, and the answers under way.

`ModelClient` joins the queue and the bus for every `Generation`, and tells those that are concerned when a replica
is lost or a slot is to be given up. `ModelStream` is what the caller reads. Limits, retrieval and HTTP are the
gateway's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from actors.errors import ClientClosed
from actors.handles.generation import Admission, Generation, ModelAccess, OnSettled
from actors.handles.llm import ReplicaPool
from actors.handles.queue import QueueClient
from actors.handles.token_stream import Write
from actors.policies.hedging import Hedging
from actors.telemetry import StageClock
from actors.types import GenerationRequest, ModelCard, Passage, TokenDelta, Usage

__all__ = ["Admission", "ModelClient", "ModelStream"]


class ModelStream:
    """The deltas of one request; an async iterator. `aclose` cancels down to the engine.

    Attributes:
        request_id: of the request.
        passages: what the answer was given as context, best first; set by the gateway.
        headers: response headers that belong to the answer; set by the gateway.
        ttft_s: time to the first delta, on the request's clock.
        expires_at: its deadline, in the event loop's time.
    """

    def __init__(self, request_id: str, generation: Generation, clock: StageClock) -> None:
        self.request_id = request_id
        self.passages: Sequence[Passage] = ()
        self.headers: dict[str, str] = {}
        self.ttft_s = generation.ttft_s
        self.expires_at = generation.expires_at
        self._generation = generation
        self._tokens = generation.tokens
        self._clock = clock

    def __aiter__(self) -> ModelStream:
        return self

    async def __anext__(self) -> TokenDelta:
        delta = await self._tokens.__anext__()
        if delta.usage is not None:
            self._clock.enter("other")
        return delta

    def take_ready(self) -> list[TokenDelta]:
        """Deltas that have arrived already, without waiting; the iterator goes on behind them."""
        ready = self._tokens.take_ready()
        if ready and ready[-1].usage is not None:
            self._clock.enter("other")
        return ready

    async def follow(self, write: Write) -> None:
        """Hand every delta to `write` as it comes, to the last one; see `TokenStream.follow`."""
        await self._tokens.follow(write)
        self._clock.enter("other")

    async def aclose(self) -> None:
        """Cancel what still runs. Safe to call twice and after the end."""
        self._generation.stop(ClientClosed("the client left"))


class ModelClient:
    """One model, from one gateway.

    Args:
        name: the model's name, which is its Serve application's.
        gateway_id: this gateway replica.
        on_lost: called when the model's queue cannot be reached.
    """

    def __init__(self, name: str, gateway_id: str, on_lost: Callable[[], None]) -> None:
        self.name = name
        self._on_lost = on_lost
        self._queue = QueueClient(name, gateway_id, self)
        self._pool = ReplicaPool(name, gateway_id, self)
        self._hedging = Hedging()
        self._under_way: dict[str, Generation] = {}  # by request id, until its engine is done with it

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
            on_settled: called once with the tokens used, None if nothing is to be paid, when the engine is done.

        Raises:
            Overloaded, DeadlineExceeded: from the queue.
            InvalidRequest: from the engine.
            Unavailable: three replicas failed under it.
        """
        request_id = request.request_id

        def settled(usage: Usage | None) -> None:
            self._under_way.pop(request_id, None)
            on_settled(usage)

        access = ModelAccess(name=self.name, queue=self._queue, pool=self._pool, hedging=self._hedging)
        generation = Generation(access, request, admission, clock, settled)
        self._under_way[request_id] = generation
        await generation.begin()
        return ModelStream(request_id, generation, clock)

    def queue_lost(self) -> None:
        """The queue's connection ended."""
        self._on_lost()

    def preempted(self, request_id: str) -> None:
        """The queue wants a running request's slot for a more urgent one."""
        generation = self._under_way.get(request_id)
        if generation is not None:
            generation.preempt()

    def replica_silent(self, replica_id: str) -> None:
        """The queue hears nothing of a replica: what runs there goes on elsewhere."""
        self._pool.give_up(replica_id)

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
