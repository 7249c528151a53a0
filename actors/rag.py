"""Retrieval inside a chat: passages under a deadline, cut to what the prompt can hold.

Used by the gateway only. A slow or dead retriever costs the context, never the chat: the answer comes without
passages and says so. How passages enter the prompt is `actors.policies.prompting`, where they come from
`actors.retriever`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from pydantic import BaseModel, ConfigDict, Field

from actors import telemetry
from actors.engines.tokens import TokenCounter, prompt_tokens
from actors.errors import DeadlineExceeded, InvalidRequest, NotFound, ShoalError
from actors.handles.retriever import RetrieverClient
from actors.policies.prompting import fitting, question_of, with_passages
from actors.telemetry import Stage, StageClock
from actors.types import (
    GenerationRequest,
    ModelCard,
    Passage,
    Principal,
    RetrievalOptions,
    RetrievalQuery,
    RetrievalResult,
)

_ANSWER_ROOM_TOKENS = 256  # kept free for the answer when max_tokens is not given
_SPARE_TOKENS = 128  # the instruction, and what a tokenizer adds around pieces counted one by one


class RetrievalSettings(BaseModel):
    """How the gateway uses the retrieval application."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    app_name: str = Field(default="retrieval", description="Serve application of the retrieval stages.")
    deadline_s: float = Field(
        default=2.0, gt=0, description="A chat goes on without passages after this; its answer says so."
    )
    embedding_model: str = Field(
        default="all-MiniLM-L6-v2", description="Name of the embedding model for /v1/embeddings."
    )
    embed_timeout_s: float = Field(default=30.0, gt=0, description="For one /v1/embeddings call.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """What retrieval gave; `degraded` names what is missing, empty when nothing is."""

    passages: tuple[Passage, ...] = ()
    degraded: str = ""


class RagStage:
    """Retrieval for chats.

    Args:
        settings: see `RetrievalSettings`.
    """

    def __init__(self, settings: RetrievalSettings) -> None:
        self._settings = settings
        self._retriever = RetrieverClient(settings.app_name)

    async def search(self, query: RetrievalQuery, clock: StageClock | None = None) -> RetrievalResult:
        """Search; the clock's current stage gives up what embedding and reranking took.

        Raises:
            NotFound: there is no such vector store.
            Unavailable, DeadlineExceeded: neither index answered.
        """
        result = await self._retriever.search(query, timeout_s=self._settings.deadline_s)
        if clock is not None:
            clock.split(_other_stages(result.stage_s))
        return result

    async def context(
        self, principal: Principal, request: GenerationRequest, options: RetrievalOptions, clock: StageClock
    ) -> Context:
        """Passages for the last user message, or the reason why there are none.

        Raises:
            NotFound, InvalidRequest: the caller named a store or a filter that does not exist.
        """
        query = RetrievalQuery(
            tenant=principal.tenant,
            vector_store_ids=options.vector_store_ids,
            text=question_of(request.messages or ()),
            max_num_results=options.max_num_results,
            score_threshold=options.score_threshold,
            filters=options.filters,
            ranker=options.ranker,
        )
        clock.enter("retrieve")
        try:
            result = await self.search(query, clock)
            context = Context(passages=result.passages, degraded=result.degraded)
        except (InvalidRequest, NotFound):
            raise
        except DeadlineExceeded:
            context = Context(degraded="retrieval=timeout")
        except ShoalError:  # down, overloaded or broken: none of it is the chat's
            context = Context(degraded="retrieval=unavailable")
        finally:
            clock.enter("other")
        if context.degraded:
            telemetry.count("shoal_retrieval_degraded_total", reason=context.degraded)
        return context


def with_context(
    request: GenerationRequest, context: Context, card: ModelCard | None, counter: TokenCounter
) -> tuple[GenerationRequest, tuple[Passage, ...]]:
    """The request with the best passages that fit into the model's context, and those passages."""
    if not context.passages:
        return request, ()
    passages = context.passages
    if card is not None:
        answer = request.sampling.max_tokens or _ANSWER_ROOM_TOKENS
        room = card.context_tokens - prompt_tokens(card, request) - answer - _SPARE_TOKENS
        passages = fitting(passages, room_tokens=room, count=counter.count)
    return replace(request, messages=with_passages(request.messages or (), passages)), passages


def _other_stages(stage_s: Mapping[str, float]) -> dict[Stage, float]:
    known: tuple[Stage, ...] = ("embed", "rerank")  # "retrieve" is the stage that the clock is in
    return {stage: stage_s[stage] for stage in known if stage in stage_s}
