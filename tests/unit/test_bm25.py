"""BM25 over chunks: words, order, scale, and taking over work from the index before."""

import asyncio

import pytest

from actors.errors import Unavailable
from actors.index.bm25 import Bm25Index, words
from actors.index.bm25_cache import Bm25Cache, Wanted
from actors.index.protocol import IndexEntry


class All:
    """Every document version is wanted."""

    def __contains__(self, key):
        return True


def entries(file_id, *texts):
    return [
        IndexEntry(chunk_id=f"{file_id}.{n}", file_id=file_id, filename=f"{file_id}.txt", text=text, start=0)
        for n, text in enumerate(texts)
    ]


def index_of(**files):
    fresh = {(name, "v1"): entries(name, *texts) for name, texts in files.items()}
    return Bm25Index().replaced(fresh, fresh)


def ids(hits):
    return [hit.entry.chunk_id for hit in hits]


def test_words_are_lower_case_singular_and_without_stop_words():
    assert words("The Queries, and their max_tokens!") == ["query", "max", "token"]
    assert words("bus glasses classes") == ["bus", "glasse", "classe"]
    assert words("Größe naïve") == ["größe", "naïve"]


def test_scripts_without_spaces_become_pairs_of_characters():
    assert words("東京都 へ") == ["東京", "京都", "へ"]


def test_rare_words_weigh_more_and_chunks_without_a_word_are_no_hits():
    index = index_of(
        a=["the valve of the reactor", "the pump of the reactor"],
        b=["reactor reactor", "nothing here to see"],
    )
    hits = index.search("reactor valve", 10, All())
    assert ids(hits)[0] == "a.0"
    assert set(ids(hits)) == {"a.0", "a.1", "b.0"}


def test_the_score_is_the_share_of_the_querys_information_that_is_answered():
    index = index_of(a=["alpha beta"], b=["alpha"], c=["delta"])
    both = index.search("alpha beta", 1, All())[0].score
    half_unknown = index.search("alpha beta unheard words", 1, All())[0].score
    assert 0 < half_unknown < both <= 1
    assert index.search("unheard", 5, All()) == []
    assert index.search("the of and", 5, All()) == []


def test_a_long_chunk_counts_by_its_best_piece():
    filler = " ".join(f"filler{n}" for n in range(600))
    index = index_of(
        long=[f"{filler} rudder helm {filler}"], short=["rudder something helm or other"], x=["y"]
    )
    scores = {hit.entry.chunk_id: hit.score for hit in index.search("rudder helm", 5, All())}
    assert scores["long.0"] > 0.4 * scores["short.0"]
    assert len(scores) == 2


def test_only_wanted_document_versions_are_found_and_k_counts_those():
    index = index_of(**{f"f{n:02}": ["common word", "common thing"] for n in range(40)})
    wanted = {("f07", "v1"), ("f31", "v1"), ("f31", "v2")}
    assert ids(index.search("common", 3, wanted)) == ["f07.0", "f07.1", "f31.0"]
    assert len(index.search("common", 10, wanted)) == 4


def test_equal_scores_come_in_the_order_of_the_documents():
    index = index_of(b=["same text"], a=["same text"], c=["same text"])
    assert ids(index.search("same text", 3, All())) == ["b.0", "a.0", "c.0"]


def test_an_empty_index_finds_nothing():
    assert Bm25Index().search("anything", 5, All()) == []
    blank = index_of(a=["", "the"])
    assert blank.search("the", 5, All()) == []


def test_replacing_takes_over_known_versions_and_gives_what_a_fresh_build_gives():
    before = index_of(a=["alpha beta"], b=["beta gamma"])
    fresh = {("c", "v1"): entries("c", "gamma alpha alpha")}
    after = before.replaced([("a", "v1"), ("c", "v1")], fresh)
    built = index_of(a=["alpha beta"], c=["gamma alpha alpha"])
    for query in ("alpha", "gamma", "beta"):
        theirs = [(hit.entry.chunk_id, pytest.approx(hit.score)) for hit in built.search(query, 5, All())]
        assert [(hit.entry.chunk_id, hit.score) for hit in after.search(query, 5, All())] == theirs
    assert after.key_of("c.0") == ("c", "v1")
    assert after.key_of("b.0") is None
    assert before.key_of("b.0") == ("b", "v1")


# --- the cache ---------------------------------------------------------------------------------------


class Documents:
    def __init__(self):
        self.texts = {}
        self.reads = []
        self.gate = None
        self.error = None

    async def read(self, key):
        self.reads.append(key)
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        return entries(key[0], *self.texts[key])

    def wanted(self, generation):
        return Wanted(generation, tuple(self.texts))


@pytest.fixture
def documents():
    documents = Documents()
    documents.texts = {("a", "v1"): ["alpha"], ("b", "v1"): ["beta"]}
    return documents


async def test_an_index_is_built_once_however_many_ask(documents):
    cache = Bm25Cache(10**9)
    found = await asyncio.gather(*(cache.get("s", documents.wanted(1), documents.read) for _ in range(5)))
    assert len({id(index) for index in found}) == 1
    assert len(documents.reads) == 2


async def test_a_new_generation_reads_only_what_is_new(documents, monkeypatch):
    monkeypatch.setattr("actors.index.bm25_cache._BUSY_SHARE", 1e9)
    cache = Bm25Cache(10**9)
    await cache.get("s", documents.wanted(1), documents.read)
    documents.texts = {("a", "v1"): ["alpha"], ("b", "v2"): ["gamma"]}
    index = await cache.get("s", documents.wanted(2), documents.read)
    assert documents.reads[2:] == [("b", "v2")]
    assert ids(index.search("gamma", 5, All())) == ["b.0"]
    assert index.search("beta", 5, All()) == []


async def test_a_large_store_answers_from_its_old_index_while_the_new_one_is_built(documents, monkeypatch):
    monkeypatch.setattr("actors.index.bm25_cache._BUSY_SHARE", 1e9)
    monkeypatch.setattr("actors.index.bm25_cache._WORTH_WAITING_S", 0.0)
    cache = Bm25Cache(10**9)
    old = await cache.get("s", documents.wanted(1), documents.read)
    documents.gate = asyncio.Event()
    documents.texts[("c", "v1")] = ["gamma"]
    assert await cache.get("s", documents.wanted(2), documents.read) is old
    documents.gate.set()
    await asyncio.gather(*cache._builds.values())
    assert await cache.get("s", documents.wanted(2), documents.read) is not old


async def test_a_fast_moving_store_does_not_build_all_the_time(documents, monkeypatch):
    monkeypatch.setattr("actors.index.bm25_cache._BUSY_SHARE", 1e-9)
    cache = Bm25Cache(10**9)
    first = await cache.get("s", documents.wanted(1), documents.read)
    documents.texts[("c", "v1")] = ["gamma"]
    assert await cache.get("s", documents.wanted(2), documents.read) is first
    assert not cache._builds


async def test_a_search_that_gives_up_does_not_stop_the_build(documents):
    cache = Bm25Cache(10**9)
    documents.gate = asyncio.Event()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await cache.get("s", documents.wanted(1), documents.read)
    documents.gate.set()
    await cache.get("s", documents.wanted(1), documents.read)
    assert len(documents.reads) == 2


async def test_a_failed_build_is_the_searchs_failure_unless_there_is_an_older_index(documents, monkeypatch):
    monkeypatch.setattr("actors.index.bm25_cache._BUSY_SHARE", 1e9)
    cache = Bm25Cache(10**9)
    documents.error = Unavailable("down")
    with pytest.raises(Unavailable):
        await cache.get("s", documents.wanted(1), documents.read)
    documents.error = None
    old = await cache.get("s", documents.wanted(1), documents.read)
    documents.error = Unavailable("down")
    documents.texts[("c", "v1")] = ["gamma"]
    assert await cache.get("s", documents.wanted(2), documents.read) is old
    documents.error = None
    assert await cache.get("s", documents.wanted(2), documents.read) is not old


async def test_the_stores_not_searched_for_longest_make_room(documents):
    size = (await Bm25Cache(10**9).get("s", documents.wanted(1), documents.read)).size_bytes
    cache = Bm25Cache(int(2.5 * size))
    for store in ("one", "two", "one", "three"):
        await cache.get(store, documents.wanted(1), documents.read)
    assert list(cache._built) == ["one", "three"]
