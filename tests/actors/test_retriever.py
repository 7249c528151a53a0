"""`Retriever`: what a search finds, and what it says when parts are late, down or lying."""

import asyncio
import time
from dataclasses import replace

import numpy as np
import pytest

from actors.engines.embedding import EmbeddingModelConfig
from actors.engines.scripted_embedding import ScriptedEmbeddingModel
from actors.errors import (
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    Overloaded,
    ReplicaGone,
    ShoalError,
    Unavailable,
)
from actors.handles.embedder import EmbedderClient
from actors.index.memory import MemoryIndex
from actors.index.protocol import IndexEntry
from actors.policies.chunking import chunk_id, window_id
from actors.policies.load import LoadSnapshot
from actors.retrieval_parts import RetrievalParts
from actors.retriever import Retriever, RetrieverConfig, _Questions
from actors.stores.catalog_records import StoreFileRecord
from actors.stores.documents import DocumentVersion
from actors.types import Embeddings, RetrievalQuery

T = "acme"
MODEL = ScriptedEmbeddingModel(EmbeddingModelConfig(model="scripted"))
TEXTS = {
    "pump.md": [
        "The pump moves water through the cooling loop.",
        "Spare parts of the pump are in hall four.",
    ],
    "valve.md": ["A valve stops the water when the pressure is too high."],
    "menu.md": ["On Monday the canteen serves lentil soup."],
}


class Part:
    """A part that may be late or raise; counts its calls."""

    def __init__(self):
        self.calls = 0
        self.delay_s = 0.0
        self.error = None

    async def trouble(self):
        self.calls += 1
        await asyncio.sleep(self.delay_s)
        if self.error is not None:
            raise self.error


class Embed(Part):
    async def __call__(self, text, timeout_s):
        await self.trouble()
        return MODEL.embed([MODEL.tokenize([text], "query")[0].windows[0]])


class Index(MemoryIndex, Part):
    def __init__(self):
        MemoryIndex.__init__(self)
        Part.__init__(self)
        self.broken = set()
        self.asked = []

    async def query(self, collection, embedding, k):
        self.asked.append((collection, k))
        await self.trouble()
        if collection in self.broken:
            raise Unavailable("the vector index failed")
        return await super().query(collection, embedding, k)


class Catalog(Part):
    def __init__(self):
        super().__init__()
        self.stores = {}
        self.reads = 0

    def put(self, tenant, store, records):
        generation = self.stores.get((tenant, store), (0, ()))[0]
        self.stores[tenant, store] = (generation + 1, tuple(records))

    async def generation(self, tenant, store):
        await self.trouble()
        if (tenant, store) not in self.stores:
            raise NotFound(f"no such vector store: {store}")
        return self.stores[tenant, store][0]

    async def published(self, tenant, store):
        self.reads += 1
        return await self.generation(tenant, store), self.stores[tenant, store][1]


class Documents(Part):
    def __init__(self):
        super().__init__()
        self.versions = {}

    async def get_version(self, tenant, store, file_id, version):
        await self.trouble()
        try:
            return self.versions[tenant, store, file_id, version]
        except KeyError:
            raise NotFound("the object does not exist in the document store") from None


class World:
    """All parts, and the ingestion that fills them."""

    def __init__(self):
        self.embed, self.index, self.catalog, self.documents = Embed(), Index(), Catalog(), Documents()

    def retriever(self, **config):
        parts = RetrievalParts(
            embed=self.embed, index=self.index, catalog=self.catalog, documents=self.documents
        )
        return Retriever(RetrieverConfig(**{"deadline_s": 1.0, **config}), parts)

    async def ingest(self, store="vs_1", texts=None, *, attributes=None, windows=1):
        records = [
            record
            for name, chunks in (texts or TEXTS).items()
            for record in [await self.add(store, name, chunks, windows=windows)]
        ]
        if attributes:
            records = [replace(one, attributes=attributes.get(one.filename, {})) for one in records]
        self.catalog.put(T, store, records)

    async def add(self, store, name, chunks, *, version="v1", windows=1):
        file_id = f"file-{name}"
        text = "\n".join(chunks)
        spans = [(text.index(chunk), text.index(chunk) + len(chunk)) for chunk in chunks]
        document = DocumentVersion(
            vector_store_id=store,
            file_id=file_id,
            filename=name,
            version=version,
            text=text,
            spans=tuple(spans),
            embeddings=b"",
            rows=(windows,) * len(chunks),
            dimensions=MODEL.info.dimensions,
            embedding_model="scripted",
        )
        self.documents.versions[T, store, file_id, version] = document
        for entry_id, chunk in document.entry_ids:
            entry = IndexEntry(
                chunk_id=entry_id, file_id=file_id, filename=name, text=chunk.text, start=chunk.start
            )
            vector = MODEL.embed([MODEL.tokenize([chunk.text], "passage")[0].windows[0]])
            await self.index.upsert(store, [entry], vector)
        return StoreFileRecord(
            file_id=file_id,
            vector_store_id=store,
            filename=name,
            created_at=0,
            revision="r",
            status="completed",
            version=version,
        )


def query(text="How does the pump move water?", stores=("vs_1",), **changes):
    return RetrievalQuery(**{"tenant": T, "vector_store_ids": stores, "text": text, **changes})


def names(result):
    return [passage.filename for passage in result.passages]


@pytest.fixture
async def world():
    world = World()
    await world.ingest()
    return world


# --- what is found -----------------------------------------------------------------------------------


async def test_the_best_passage_comes_first_with_everything_a_citation_needs(world):
    result = await world.retriever().search(query())
    first = result.passages[0]
    assert (first.filename, first.file_id, first.vector_store_id) == ("pump.md", "file-pump.md", "vs_1")
    assert first.text == TEXTS["pump.md"][0]
    assert first.chunk_id == chunk_id("vs_1", "file-pump.md", "v1", 0)
    assert first.start == 0
    assert first.score == pytest.approx(1.0)
    assert result.degraded == ""
    scores = [passage.score for passage in result.passages]
    assert scores == sorted(scores, reverse=True)
    assert all(0 < score <= 1 for score in scores)


async def test_the_same_search_gives_the_same_answer(world):
    retriever = world.retriever()
    first = await retriever.search(query())
    assert (await retriever.search(query())).passages == first.passages


async def test_max_num_results_and_score_threshold_bound_the_passages(world):
    retriever = world.retriever()
    assert len((await retriever.search(query(max_num_results=1))).passages) == 1
    good = (await retriever.search(query(score_threshold=0.6))).passages
    assert good
    assert all(passage.score >= 0.6 for passage in good)


@pytest.mark.parametrize("ranker", ["dense", "bm25"])
async def test_one_index_may_be_asked_alone(world, ranker):
    result = await world.retriever().search(query(ranker=ranker))
    assert names(result)[0] == "pump.md"
    assert 0 < result.passages[0].score < 1
    assert (world.index.calls > 0) == (ranker == "dense")
    assert (world.documents.calls > 0) == (ranker == "bm25")


async def test_windows_of_a_chunk_are_one_passage_by_their_best(world):
    await world.ingest("vs_2", windows=3)
    best = query(stores=("vs_2",), ranker="dense")
    result = await world.retriever(candidates=4).search(best)
    found = [passage.chunk_id for passage in result.passages]
    assert len(set(found)) == len(found) > 1
    assert all("." not in one for one in found)
    assert found[0] == chunk_id("vs_2", "file-pump.md", "v1", 0)
    assert window_id(found[0], 1) != found[0]
    assert [k for _, k in world.index.asked] == [4, 16]  # once more: four windows were too few chunks


async def test_several_stores_are_searched_as_one(world):
    await world.ingest(
        "vs_2", {"turbine.md": ["The turbine is driven by steam, and a pump moves water to it."]}
    )
    result = await world.retriever().search(query("pump and turbine", stores=("vs_1", "vs_2", "vs_1")))
    assert {passage.vector_store_id for passage in result.passages} == {"vs_1", "vs_2"}
    assert result.passages[0].filename == "turbine.md"
    assert len(names(result)) == len({passage.chunk_id for passage in result.passages})


async def test_filters_are_asked_of_the_catalogs_attributes(world):
    await world.ingest(attributes={"valve.md": {"lang": "en"}, "menu.md": {"lang": "de"}})
    wanted = {"type": "eq", "key": "lang", "value": "en"}
    result = await world.retriever(filtered_candidates=77).search(query(filters=wanted))
    assert set(names(result)) == {"valve.md"}
    assert result.passages[0].attributes == {"lang": "en"}
    assert world.index.asked == [("vs_1", 77)]


async def test_a_question_is_embedded_once(monkeypatch):
    calls = []

    async def embed(_client, inputs, *, kind, timeout_s):
        calls.append((list(inputs), kind))
        rows = MODEL.embed([MODEL.tokenize(inputs, kind)[0].windows[0]])
        return Embeddings(vectors=rows.tobytes(), dimensions=rows.shape[1], tokens=1)

    monkeypatch.setattr(EmbedderClient, "embed", embed)
    questions = _Questions(EmbedderClient("retrieval"))
    first, second = await questions.embed("why?", 1.0), await questions.embed("why?", 1.0)
    assert np.array_equal(first, second)
    assert calls == [(["why?"], "query")]


# --- what changes ------------------------------------------------------------------------------------


async def test_what_is_published_is_found_and_what_is_removed_is_not_even_if_the_index_still_has_it(world):
    retriever = world.retriever()
    await retriever.search(query())
    records = world.catalog.stores[T, "vs_1"][1]
    fresh = await world.add("vs_1", "new.md", ["A new pump moves water twice as fast."])
    world.catalog.put(T, "vs_1", [*records[1:], fresh])  # pump.md is gone from the catalog alone
    found = names(await retriever.search(query()))
    assert "new.md" in found
    assert "pump.md" not in found


async def test_entries_of_a_replaced_version_are_not_found_twice(world):
    record = await world.add("vs_1", "valve.md", ["A valve stops the water at last."], version="v2")
    records = [one for one in world.catalog.stores[T, "vs_1"][1] if one.filename != "valve.md"]
    world.catalog.put(T, "vs_1", [*records, record])
    result = await world.retriever().search(query("valve stops water"))
    texts = [passage.text for passage in result.passages if passage.filename == "valve.md"]
    assert texts == ["A valve stops the water at last."]


async def test_a_store_that_stands_still_costs_one_small_question(world):
    retriever = world.retriever()
    for _ in range(5):
        await retriever.search(query())
    assert world.catalog.reads == 1
    assert world.documents.calls == 3


async def test_a_document_that_vanishes_while_the_index_is_built_is_left_out_alone(world):
    del world.documents.versions[T, "vs_1", "file-menu.md", "v1"]
    result = await world.retriever().search(query(ranker="bm25"))
    assert names(result)[0] == "pump.md"


async def test_another_tenants_store_does_not_exist(world):
    with pytest.raises(NotFound):
        await world.retriever().search(query(tenant="other"))
    with pytest.raises(NotFound):
        await world.retriever().search(query(stores=("vs_1", "vs_none")))


async def test_entries_of_another_tenant_in_the_same_collection_are_never_found(world):
    alien = IndexEntry(
        chunk_id="x", file_id="file-alien", filename="alien.md", text="pump moves water", start=0
    )
    vector = MODEL.embed([MODEL.tokenize(["How does the pump move water?"], "query")[0].windows[0]])
    await world.index.upsert("vs_1", [alien], vector)
    result = await world.retriever().search(query())
    assert "alien.md" not in names(result)


# --- late and down -----------------------------------------------------------------------------------

LATE = 30.0


@pytest.mark.parametrize(
    ("part", "trouble", "degraded"),
    [
        ("embed", {"delay_s": LATE}, "embed=timeout"),
        ("embed", {"error": ReplicaGone("gone")}, "embed=unavailable"),
        ("embed", {"error": DeadlineExceeded("late")}, "embed=timeout"),
        ("embed", {"error": Overloaded("busy", retry_after_s=3)}, "embed=unavailable"),
        ("index", {"delay_s": LATE}, "vector=timeout"),
        ("index", {"error": Unavailable("down")}, "vector=unavailable"),
        ("index", {"error": RuntimeError("a bug")}, "vector=unavailable"),
        ("documents", {"delay_s": LATE}, "bm25=timeout"),
        ("documents", {"error": Unavailable("down")}, "bm25=unavailable"),
    ],
)
async def test_a_part_that_is_late_or_down_is_left_out_and_named(world, part, trouble, degraded):
    vars(getattr(world, part)).update(trouble)
    started = time.monotonic()
    result = await world.retriever(deadline_s=0.3).search(query())
    assert time.monotonic() - started < 0.3 + 0.1
    assert result.degraded == degraded
    assert names(result)[0] == "pump.md"
    assert result.passages[0].score == pytest.approx(1.0)


async def test_the_callers_shorter_deadline_counts(world):
    world.index.delay_s = LATE
    started = time.monotonic()
    result = await world.retriever(deadline_s=10).search(query(), 0.2)
    assert time.monotonic() - started < 0.35
    assert result.degraded == "vector=timeout"


@pytest.mark.parametrize(
    ("delay_s", "error", "expected"),
    [
        (LATE, None, DeadlineExceeded),
        (0, Unavailable("down"), Unavailable),
        (0, ValueError("bug"), Unavailable),
    ],
)
async def test_the_search_fails_when_nothing_answers(world, delay_s, error, expected):
    for part in (world.index, world.documents):
        part.delay_s, part.error = delay_s, error
    with pytest.raises(expected) as failed:
        await world.retriever(deadline_s=0.3).search(query())
    assert type(failed.value) is expected
    if expected is Unavailable:
        assert failed.value.retry_after_s > 0


async def test_the_circuit_opens_after_five_failures_and_closes_when_the_part_is_well(world):
    retriever = world.retriever(deadline_s=0.2, open_s=0.3)
    world.index.delay_s = LATE
    degraded = [(await retriever.search(query())).degraded for _ in range(7)]
    assert degraded == ["vector=timeout"] * 5 + ["vector=unavailable"] * 2
    assert world.index.calls == 5
    started = time.monotonic()
    await retriever.search(query())
    assert time.monotonic() - started < 0.1  # nothing waits for a part that is known to be down
    world.index.delay_s = 0
    await asyncio.sleep(0.35)
    assert (await retriever.search(query())).degraded == ""


async def test_a_part_is_not_blamed_for_a_caller_without_time(world):
    retriever = world.retriever(deadline_s=2.0)
    world.index.delay_s = 0.1
    for _ in range(8):
        assert (await retriever.search(query(), 0.05)).degraded == "vector=timeout"
    assert (await retriever.search(query())).degraded == ""


async def test_a_broken_collection_does_not_take_the_others_with_it(world):
    await world.ingest("vs_2")
    world.index.broken = {"vs_1"}
    retriever = world.retriever()
    for _ in range(6):
        assert (await retriever.search(query())).degraded == "vector=unavailable"
    assert (await retriever.search(query(stores=("vs_2",)))).degraded == ""
    both = await retriever.search(query(stores=("vs_1", "vs_2"), ranker="dense"))
    assert both.degraded == "vector=unavailable"
    assert {passage.vector_store_id for passage in both.passages} == {"vs_2"}


async def test_while_the_catalog_is_down_what_was_known_last_is_searched(world):
    retriever = world.retriever()
    await retriever.search(query())
    world.catalog.error = Unavailable("down")
    result = await retriever.search(query())
    assert result.degraded == "catalog=unavailable"
    assert names(result)[0] == "pump.md"
    world.catalog.error = None
    assert (await retriever.search(query())).degraded == ""
    world.catalog.error = Unavailable("down")
    with pytest.raises(Unavailable):
        await world.retriever().search(query())


async def test_a_search_that_is_cancelled_leaves_nothing_running(world):
    world.index.delay_s = world.documents.delay_s = LATE
    before = asyncio.all_tasks()
    search = asyncio.create_task(world.retriever().search(query(ranker="dense")))
    await asyncio.sleep(0.05)
    search.cancel()
    with pytest.raises(asyncio.CancelledError):
        await search
    await asyncio.sleep(0.01)
    assert asyncio.all_tasks() == before


# --- time, load, bad input ---------------------------------------------------------------------------


async def test_the_stages_add_up_to_the_wall_time_and_name_who_was_slow(world):
    world.index.delay_s, world.embed.delay_s = 0.2, 0.1
    started = time.monotonic()
    result = await world.retriever().search(query())
    elapsed = time.monotonic() - started
    assert sum(result.stage_s.values()) == pytest.approx(elapsed, abs=0.01)
    assert result.stage_s["embed"] == pytest.approx(0.1, abs=0.05)
    assert result.stage_s["retrieve"] == pytest.approx(0.2, abs=0.05)
    assert set(result.stage_s) == {"embed", "retrieve", "rerank"}


async def test_its_load_is_what_the_scaling_policy_reads(world):
    retriever = world.retriever()
    world.index.delay_s = 0.2
    searches = [asyncio.create_task(retriever.search(query())) for _ in range(3)]
    await asyncio.sleep(0.05)
    assert LoadSnapshot.from_stats(retriever.record_autoscaling_stats()).running == 3
    await asyncio.gather(*searches)
    load = LoadSnapshot.from_stats(retriever.record_autoscaling_stats())
    assert load.running == 0
    assert load.work_per_request_s == pytest.approx(0.2 / 16, rel=0.5)
    await retriever.check_health()


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"text": "  "}, "query"),
        ({"vector_store_ids": ()}, "vector_store_ids"),
        ({"vector_store_ids": tuple(f"vs_{n}" for n in range(21))}, "vector_store_ids"),
        ({"max_num_results": 0}, "max_num_results"),
        ({"max_num_results": 51}, "max_num_results"),
        ({"score_threshold": 1.5}, "ranking_options.score_threshold"),
        ({"filters": {"type": "like"}}, "filters.type"),
    ],
)
async def test_bad_input_is_refused_by_its_field(world, changes, param):
    bad = RetrievalQuery(**{"tenant": T, "vector_store_ids": ("vs_1",), "text": "x", **changes})
    with pytest.raises(InvalidRequest) as refused:
        await world.retriever().search(bad)
    assert isinstance(refused.value, ShoalError)
    assert refused.value.param == param
