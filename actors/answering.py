"""Answering one call: find the model, retrieve, build the prompt, reserve limits, queue, stream, settle.

Owns the order of these steps for everybody who asks for answers: the gateway for callers who wait, the job runner
for those who do not. Who the caller is was settled before; where tokens come from is `actors.handles`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from actors import telemetry
from actors.engines.tokens import TokenCounter, counter_for, prompt_tokens
from actors.errors import ContextLengthExceeded, InvalidRequest
from actors.handles.embedder import EmbedderClient
from actors.handles.model import Admission, ModelStream
from actors.handles.models import ModelDirectory
from actors.policies.prediction import OutputPredictor
from actors.policies.prefix import prefix_of
from actors.rag import Context, RagStage, with_context
from actors.stores.keys import AuthenticatedKey
from actors.stores.limits import LimitStore, Reservation
from actors.telemetry import StageClock
from actors.types import Embeddings, GenerationCall, GenerationRequest, ModelCard, Principal, Usage

_CARD_WAIT_S = 2.0  # a model that never had a replica is served without knowing its tokenizer
_COUNT_IN_THREAD_CHARS = 50_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Deadlines:
    """Of calls, in seconds."""

    default_s: float  # of a call that names none
    longest_s: float  # that a call may name


class Answering:
    """Answers calls; shared by all of one process.

    Args:
        member_id: names this process to the models' queues.
        limits: what callers may use.
        rag: retrieval; None: this system has none.
        deadlines: see `Deadlines`.

    Attributes:
        models: which are deployed.
    """

    def __init__(
        self, member_id: str, limits: LimitStore, rag: RagStage | None, deadlines: Deadlines
    ) -> None:
        self.models = ModelDirectory(member_id)
        self._limits = limits
        self._rag = rag
        self._deadlines = deadlines
        self._predictor = OutputPredictor()
        self._counters: dict[str, TokenCounter] = {}
        self._background: set[asyncio.Task[None]] = set()

    def rag_stage(self) -> RagStage:
        """Retrieval.

        Raises:
            InvalidRequest: this system has none.
        """
        if self._rag is None:
            raise InvalidRequest("this system has no retrieval stage", param="retrieval")
        return self._rag

    async def context(self, principal: Principal, call: GenerationCall, clock: StageClock) -> Context:
        """What the call's documents say, as far as the prompt has room for it; nothing when it names none.

        Raises:
            NotFound, InvalidRequest: a store or a filter that does not exist.
        """
        context = await self._search(principal, call, clock)
        model = await self.models.find(call.model)
        card = model.card or await model.wait_for_card(_CARD_WAIT_S)
        return replace(context, passages=with_context(call.request, context, card, self._counter(card))[1])

    async def check(self, call: GenerationCall) -> str:
        """The name of the deployed model that would answer.

        Raises:
            ModelNotFound, ContextLengthExceeded: it can never be answered.
        """
        model = await self.models.find(call.model)
        await count(model.card or await model.wait_for_card(_CARD_WAIT_S), call.request)
        return model.name

    async def generate(
        self,
        caller: AuthenticatedKey,
        call: GenerationCall,
        clock: StageClock,
        *,
        context: Context | None = None,
        requests: int = 1,
    ) -> ModelStream:
        """Run one generation; returns when its first delta is at hand, or all of one wanted whole.

        Args:
            caller: who asks, in the class that it runs in.
            call: its model is a deployed one's name, its request carries the tenant's cache salt.
            clock: enters the stages.
            context: what the documents say, when that was asked before.
            requests: how many it counts for in the limits: none when it was counted as it was accepted.

        Raises:
            ShoalError: anything that goes wrong before the first token.
        """
        principal, request = caller.principal, call.request
        timeout_s = min(call.timeout_s or self._deadlines.default_s, self._deadlines.longest_s)
        model = await self.models.find(call.model)
        card = model.card or await model.wait_for_card(_CARD_WAIT_S)
        if context is None:
            context = await self._search(principal, call, clock)
        request, passages = with_context(request, context, card, self._counter(card))
        tokens = await count(card, request)
        predicted = self._predictor.predict(principal.tenant, request.sampling.max_tokens)
        expected = self._predictor.expect(principal.tenant, request.sampling.max_tokens)
        reservation = await self._limits.reserve(
            caller, tokens + expected * request.sampling.n, requests=requests
        )

        def settle(usage: Usage | None) -> None:
            self._settle(principal, model.name, request, reservation, usage)

        admission = Admission(
            principal=principal,
            prompt_tokens=tokens,
            predicted_output_tokens=predicted,
            timeout_s=timeout_s - clock.elapsed_s(),
            whole=call.whole,
            prefix=prefix_of(request),
        )
        stream = await model.generate(request, admission, clock, settle)
        telemetry.observe(
            "shoal_ttft_seconds", stream.ttft_s, model=model.name, class_=principal.priority.value
        )
        stream.passages = passages
        stream.headers |= self._limits.headers(reservation)
        if context.degraded:
            stream.headers["x-shoal-degraded"] = context.degraded
        return stream

    async def aclose(self) -> None:
        """End the connections, settle what is left."""
        await asyncio.gather(self.models.close(), *self._background)

    def later(self, work: Any) -> None:
        """Do something that no caller waits for."""
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _search(self, principal: Principal, call: GenerationCall, clock: StageClock) -> Context:
        if call.retrieval is None:
            return Context()
        return await self.rag_stage().context(principal, call.request, call.retrieval, clock)

    def _counter(self, card: ModelCard | None) -> TokenCounter:
        tokenizer = card.tokenizer if card is not None else ""
        if tokenizer not in self._counters:
            self._counters[tokenizer] = counter_for(tokenizer)
        return self._counters[tokenizer]

    def _settle(
        self,
        principal: Principal,
        model: str,
        request: GenerationRequest,
        reservation: Reservation,
        usage: Usage | None,
    ) -> None:
        used = usage.total_tokens if usage is not None else 0
        self.later(self._limits.settle(reservation, used))
        if usage is not None:
            self._predictor.observe(principal.tenant, usage.completion_tokens // max(request.sampling.n, 1))
            telemetry.count("shoal_tokens_total", usage.prompt_tokens, model=model, direction="in")
            telemetry.count("shoal_tokens_total", usage.completion_tokens, model=model, direction="out")


class EmbeddingCalls:
    """Embeds for callers: reserves, embeds, settles.

    Args:
        embedder: the model.
        limits: what callers may use.
        timeout_s: for one call.
    """

    def __init__(self, embedder: EmbedderClient, limits: LimitStore, timeout_s: float) -> None:
        self._embedder = embedder
        self._limits = limits
        self._timeout_s = timeout_s

    async def embed(
        self,
        caller: AuthenticatedKey,
        model: str,
        inputs: Sequence[str] | Sequence[Sequence[int]],
        dimensions: int | None,
    ) -> Embeddings:
        """Vectors of texts or token ids.

        Raises:
            InvalidRequest: from the model, about an input or the dimensions.
            RateLimited: the caller's limits are used up.
            Unavailable: the embedder is down.
        """
        reservation = await self._limits.reserve(caller, sum(_embedding_tokens(item) for item in inputs))
        used = 0
        try:
            result = await self._embedder.embed(
                inputs, kind="passage", dimensions=dimensions, timeout_s=self._timeout_s
            )
            used = result.tokens
        finally:
            await self._limits.settle(reservation, used)
        telemetry.count("shoal_tokens_total", used, model=model, direction="in")
        return result


async def count(card: ModelCard | None, request: GenerationRequest) -> int:
    """Prompt tokens, as well as they can be known without the engine, which has the last word.

    Raises:
        ContextLengthExceeded: the prompt cannot fit, whatever the template adds.
    """
    known = card or ModelCard(name="", context_tokens=0, tokenizer="")
    if _prompt_chars(request) > _COUNT_IN_THREAD_CHARS:
        tokens = await asyncio.to_thread(prompt_tokens, known, request)
    else:
        tokens = prompt_tokens(known, request)
    overhead = known.template_overhead_tokens * len(request.messages or ())
    if card is not None and tokens - overhead >= card.context_tokens:
        raise ContextLengthExceeded(
            f"the prompt has about {tokens} tokens and this model's context is {card.context_tokens}",
            param="messages" if request.messages is not None else "prompt",
        )
    return tokens


def _embedding_tokens(item: str | Sequence[int]) -> int:
    return len(item) if not isinstance(item, str) else max(1, len(item.encode()) // 4)


def _prompt_chars(request: GenerationRequest) -> int:
    return len(request.prompt or "") + sum(len(message.content) for message in request.messages or ())
