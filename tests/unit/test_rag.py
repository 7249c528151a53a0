"""Retrieval inside a chat: what a slow, dead or empty retriever does to it."""

import pytest

from actors.engines.tokens import counter_for, prompt_tokens
from actors.errors import DeadlineExceeded, NotFound, ReplicaGone, Unavailable
from actors.rag import Context, RagStage, RetrievalSettings, with_context
from actors.telemetry import StageClock
from actors.types import (
    GenerationRequest,
    Message,
    ModelCard,
    Passage,
    Principal,
    RetrievalOptions,
    RetrievalResult,
    SamplingParams,
)

WHO = Principal(tenant="acme")
CARD = ModelCard(name="m", context_tokens=1000, tokenizer="scripted")


def request(**sampling):
    messages = (Message(role="user", content="How many days of leave?"),)
    return GenerationRequest(request_id="r", messages=messages, sampling=SamplingParams(**sampling))


def passage(text="27 days of leave", number=1):
    return Passage(
        chunk_id=f"c{number}", file_id="f", filename="a.md", vector_store_id="vs", text=text, score=1.0
    )


class Retriever:
    """Answers with a result, or raises."""

    def __init__(self, outcome):
        self.outcome = outcome
        self.query = None

    async def search(self, query, *, timeout_s):
        self.query = query
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


def stage(outcome):
    rag = RagStage(RetrievalSettings())
    rag._retriever = Retriever(outcome)
    return rag


async def context(outcome):
    clock = StageClock()
    rag = stage(outcome)
    found = await rag.context(WHO, request(), RetrievalOptions(vector_store_ids=("vs",)), clock)
    return found, clock, rag


async def test_passages_come_for_the_last_user_message_and_the_callers_tenant():
    found, _, rag = await context(RetrievalResult(passages=(passage(),)))
    assert found == Context(passages=(passage(),))
    assert (rag._retriever.query.text, rag._retriever.query.tenant) == ("How many days of leave?", "acme")


@pytest.mark.parametrize(
    ("outcome", "degraded"),
    [
        (DeadlineExceeded("late"), "retrieval=timeout"),
        (Unavailable("down"), "retrieval=unavailable"),
        (ReplicaGone("died"), "retrieval=unavailable"),
        (RetrievalResult(passages=(), degraded="vector=timeout"), "vector=timeout"),
    ],
)
async def test_a_retriever_in_trouble_costs_the_context_and_says_so(outcome, degraded):
    found, clock, _ = await context(outcome)
    assert found.passages == ()
    assert found.degraded == degraded
    assert "retrieve" in clock.stages_s()


async def test_an_unknown_vector_store_is_the_callers_error():
    with pytest.raises(NotFound):
        await context(NotFound("no such vector store"))


async def test_what_embedding_took_is_no_longer_the_retrievers():
    result = RetrievalResult(passages=(), stage_s={"embed": 1e-9, "retrieve": 5.0})
    _, clock, _ = await context(result)
    assert 0 < clock.stages_s()["embed"] <= 1e-9
    assert sum(clock.stages_s().values()) == pytest.approx(clock.elapsed_s(), abs=1e-3)


def test_passages_are_cut_to_the_models_context():
    passages = tuple(passage("word " * 100, number) for number in range(1, 9))
    asked, kept = with_context(
        request(max_tokens=100), Context(passages=passages), CARD, counter_for("scripted")
    )
    assert kept == passages[: len(kept)]
    assert 0 < len(kept) < len(passages)
    assert prompt_tokens(CARD, asked) + 100 <= CARD.context_tokens
    assert asked.messages[0].role == "system"
    assert f"[{len(kept)}] a.md" in asked.messages[0].content
    assert f"[{len(kept) + 1}] a.md" not in asked.messages[0].content


def test_a_chat_without_passages_is_left_as_it_is():
    asked, kept = with_context(request(), Context(degraded="x"), CARD, counter_for("scripted"))
    assert asked == request()
    assert kept == ()
