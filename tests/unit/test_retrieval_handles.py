"""The embedder and the retriever as others call them: parts, time-outs, errors."""

import asyncio

import pytest

from actors.errors import DeadlineExceeded, InvalidRequest, Overloaded, Unavailable
from actors.handles import embedder, retriever
from actors.handles.embedder import EmbedderClient
from actors.handles.retriever import RetrieverClient
from actors.types import Embeddings, RetrievalQuery, RetrievalResult

QUERY = RetrievalQuery(tenant="acme", vector_store_ids=("vs_1",), text="why?")


class Handle:
    """A deployment handle whose methods are coroutines of the test."""

    made = 0

    def __init__(self, methods, options=None):
        self.methods, self.given = methods, options or {}

    def options(self, **options):
        return Handle(self.methods, options)

    def remote(self, *args, **kwargs):
        assert self.given["_by_reference"] is False
        if self.given.get("stream"):
            return Stream(self.methods["embed"](*args, **kwargs))
        return self.methods[self.given["method_name"]](*args, **kwargs)


class Stream:
    """What a streaming `.remote()` gives: None once a replica has the call, then its answer."""

    taken = True

    def __init__(self, answer):
        self.items, self.cancelled = self._items(answer), False

    def __anext__(self):
        return anext(self.items)

    def cancel(self):
        self.cancelled = True

    async def _items(self, answer):
        if not self.taken:
            answer.close()
            await asyncio.Event().wait()
        yield None
        yield await answer


@pytest.fixture
def deployed(monkeypatch):
    """Deploy methods by name; returns the names that handles were made for."""
    made = []

    def deploy(**methods):
        def handle(deployment, app_name):
            made.append((deployment, app_name))
            return Handle(methods)

        monkeypatch.setattr(embedder, "deployment_handle", handle)
        monkeypatch.setattr(retriever, "deployment_handle", handle)
        return made

    return deploy


def embeddings_of(inputs, rows=()):
    vectors = b"".join(len(one).to_bytes(4, "little") for one in inputs)
    return Embeddings(vectors=vectors, dimensions=1, tokens=len(inputs), rows=rows)


async def test_a_large_call_is_cut_into_parts_that_run_side_by_side_and_come_back_in_order(deployed):
    parts, running = [], []

    async def embed(inputs, kind, *, dimensions, pool):
        parts.append(len(inputs))
        running.append(None)
        most = len(running)
        await asyncio.sleep(0.01 if len(parts) % 2 else 0.001)
        running.pop()
        assert most <= 4
        assert (kind, dimensions, pool) == ("passage", None, True)
        return embeddings_of(inputs)

    made = deployed(embed=embed)
    client = EmbedderClient("retrieval")
    texts = ["x" * n for n in range(1, 301)]
    found = await client.embed(texts, timeout_s=5)
    assert found == embeddings_of(texts)
    assert parts == [64, 64, 64, 64, 44]
    await client.embed(texts[:1], timeout_s=5)
    assert made == [("Embedder", "retrieval")]


async def test_parts_are_bounded_by_bytes_too_and_one_text_may_not_be_larger_than_a_message(deployed):
    sizes = []

    async def embed(inputs, _kind, **_):
        sizes.append(len(inputs))
        return embeddings_of(inputs, rows=(1,) * len(inputs))

    deployed(embed=embed)
    client = EmbedderClient()
    found = await client.embed(["é" * 100_000] * 5, timeout_s=5, pool=False)
    assert sizes == [2, 2, 1]
    assert found.rows == (1,) * 5
    with pytest.raises(InvalidRequest, match="1,000,000 bytes") as refused:
        await client.embed(["fine", "x" * 1_000_001], timeout_s=5)
    assert refused.value.param == "input[1]"
    await client.embed([tuple(range(1000))], timeout_s=5)


async def test_an_error_names_the_input_by_its_place_in_the_whole_call(deployed):
    async def embed(inputs, _kind, **_):
        if "" in inputs:
            raise InvalidRequest("blank", f"input[{inputs.index('')}]")
        return embeddings_of(inputs)

    deployed(embed=embed)
    texts = ["x"] * 150
    texts[130] = ""
    with pytest.raises(InvalidRequest) as refused:
        await EmbedderClient().embed(texts, timeout_s=5)
    assert refused.value.param == "input[130]"


async def test_the_first_failure_cancels_the_other_parts_and_comes_as_it_is(deployed):
    cancelled = []

    async def embed(inputs, _kind, **_):
        if len(inputs) < 64:
            raise Overloaded("busy", retry_after_s=7)
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.append(len(inputs))
            raise

    deployed(embed=embed)
    with pytest.raises(Overloaded) as refused:
        await EmbedderClient().embed(["x"] * 130, timeout_s=5)
    assert refused.value.retry_after_s == 7
    await asyncio.sleep(0)
    assert cancelled == [64, 64]


async def test_the_time_out_is_for_the_whole_call(deployed):
    async def embed(inputs, _kind, **_):
        await asyncio.sleep(0.08)
        return embeddings_of(inputs)

    deployed(embed=embed)
    with pytest.raises(DeadlineExceeded, match="embedder"):
        await EmbedderClient().embed(["x"] * 64 * 12, timeout_s=0.2)  # three rounds of four parts


async def test_a_call_that_no_replica_takes_is_given_up_long_before_its_time_out(deployed, monkeypatch):
    async def embed(inputs, _kind, **_):
        return embeddings_of(inputs)

    monkeypatch.setattr(embedder, "_REPLICA_WAIT_S", 0.02)
    monkeypatch.setattr(Stream, "taken", False)
    deployed(embed=embed)
    with pytest.raises(Unavailable, match="embedder is not available") as down:
        await EmbedderClient().embed(["x"], timeout_s=30)
    assert down.value.retry_after_s == 1


async def test_an_answer_may_take_longer_than_a_replica_may_to_take_the_call(deployed, monkeypatch):
    async def embed(inputs, _kind, **_):
        await asyncio.sleep(0.1)
        return embeddings_of(inputs)

    monkeypatch.setattr(embedder, "_REPLICA_WAIT_S", 0.02)
    deployed(embed=embed)
    assert await EmbedderClient().embed(["x"], timeout_s=30) == embeddings_of(["x"])


async def test_a_search_knows_less_time_than_its_caller_has_so_that_it_can_answer_itself(deployed):
    given = []

    async def search(query, timeout_s):
        given.append((query, timeout_s))
        return RetrievalResult(passages=())

    deployed(search=search)
    client = RetrieverClient("retrieval")
    await client.search(QUERY, timeout_s=2.0)
    await client.search(QUERY, timeout_s=0.1)
    assert given == [(QUERY, pytest.approx(1.9)), (QUERY, pytest.approx(0.09))]


async def test_a_retriever_that_hangs_is_given_up(deployed):
    async def search(_query, _timeout_s):
        await asyncio.sleep(30)

    deployed(search=search)
    with pytest.raises(DeadlineExceeded, match="retriever"):
        await RetrieverClient().search(QUERY, timeout_s=0.05)
