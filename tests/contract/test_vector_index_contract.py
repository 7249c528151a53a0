"""Every vector index keeps the same promises: the one in memory and Chroma's Rust server."""

import asyncio
import shutil
import socket
import tempfile
import time
import uuid
from pathlib import Path

import httpx
import numpy as np
import pytest

from actors.errors import Conflict, StorageFull, Unavailable
from actors.index.chroma import ChromaIndex
from actors.index.memory import MemoryIndex
from actors.index.protocol import IndexEntry
from actors.local_services import ChromaServer, ChromaServerConfig
from actors.stores.config import StorageConfig

DIMENSIONS = 16


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def chroma_url():
    folder = Path(tempfile.mkdtemp(prefix="shoal-"))
    storage = StorageConfig(data_dir=folder, chroma_port=free_port())
    server = ChromaServer(ChromaServerConfig(storage=storage))
    yield storage.effective_chroma_url
    server.stop()
    shutil.rmtree(folder)


@pytest.fixture(params=["memory", "chroma"])
async def index(request):
    index = (
        MemoryIndex()
        if request.param == "memory"
        else ChromaIndex(request.getfixturevalue("chroma_url"), read_timeout_s=10)
    )
    yield index
    await index.close()


@pytest.fixture
def collection():
    return f"vs_{uuid.uuid4().hex}"


def entry(number, **changes):
    given = {
        "chunk_id": f"c{number}",
        "file_id": f"file-{number % 3}",
        "filename": "notes.md",
        "text": f"text {number} with ünïcode",
        "start": 10 * number,
        "attributes": {"lang": "en", "year": 2024, "share": 0.5, "draft": False},
    }
    return IndexEntry(**{**given, **changes})


def vectors(count, seed=0):
    rows = np.random.default_rng(seed).normal(size=(count, DIMENSIONS)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


async def test_an_entry_comes_back_as_it_was_written_with_its_cosine(index, collection):
    rows = vectors(5)
    entries = [entry(n) for n in range(5)]
    await index.upsert(collection, entries, rows)
    hits = await index.query(collection, rows[2:3], 5)
    assert hits[0].entry == entries[2]
    cosines = sorted((float(row @ rows[2]) for row in rows), reverse=True)
    assert [hit.score for hit in hits] == pytest.approx(cosines, abs=1e-5)


async def test_an_entry_without_attributes_has_none(index, collection):
    await index.upsert(collection, [entry(1, attributes={})], vectors(1))
    assert (await index.query(collection, vectors(1), 1))[0].entry.attributes == {}


async def test_writing_an_id_again_replaces_text_and_vector(index, collection):
    rows = vectors(3)
    await index.upsert(collection, [entry(1)], rows[:1])
    await index.upsert(collection, [entry(1, text="new"), entry(2)], rows[1:])
    hits = await index.query(collection, rows[1:2], 10)
    assert [hit.entry.text for hit in hits if hit.entry.chunk_id == "c1"] == ["new"]
    assert len(hits) == 2
    assert hits[0].score == pytest.approx(1, abs=1e-5)


async def test_k_bounds_the_hits_and_equal_scores_come_in_the_order_of_their_ids(index, collection):
    row = vectors(1)
    await index.upsert(collection, [entry(n) for n in (3, 1, 2)], np.repeat(row, 3, axis=0))
    hits = await index.query(collection, row, 10)
    assert [hit.entry.chunk_id for hit in hits] == ["c1", "c2", "c3"]
    assert len(await index.query(collection, row, 2)) == 2


async def test_a_missing_collection_is_empty_and_deleting_from_it_does_nothing(index, collection):
    assert await index.query(collection, vectors(1), 5) == []
    assert await index.missing(collection, ["c1"], vectors(1)) == ["c1"]
    await index.delete_files(collection, ["file-1"])
    await index.delete_entries(collection, ["c1"])
    await index.drop(collection)


async def test_deleting_files_removes_all_of_their_entries_and_nothing_else(index, collection):
    rows = vectors(9)
    await index.upsert(collection, [entry(n) for n in range(9)], rows)
    await index.delete_files(collection, ["file-0", "file-1", "file-none"])
    hits = await index.query(collection, rows[:1], 20)
    assert {hit.entry.file_id for hit in hits} == {"file-2"}
    assert len(hits) == 3


async def test_deleting_entries_ignores_unknown_ids(index, collection):
    rows = vectors(3)
    await index.upsert(collection, [entry(n) for n in range(3)], rows)
    await index.delete_entries(collection, ["c0", "unknown"])
    assert {hit.entry.chunk_id for hit in await index.query(collection, rows[:1], 9)} == {"c1", "c2"}


async def test_a_dropped_collection_can_be_written_again(index, collection):
    rows = vectors(2)
    await index.upsert(collection, [entry(0)], rows[:1])
    await index.drop(collection)
    assert await index.query(collection, rows[:1], 5) == []
    await index.upsert(collection, [entry(1)], rows[1:])
    assert [hit.entry.chunk_id for hit in await index.query(collection, rows[:1], 5)] == ["c1"]


async def test_missing_names_what_does_not_find_itself(index, collection):
    rows = vectors(4)
    await index.upsert(collection, [entry(n) for n in range(3)], rows[:3])
    ids = ["c0", "c1", "c3"]
    assert await index.missing(collection, ids, rows[[0, 1, 3]]) == ["c3"]
    assert await index.missing(collection, [], rows[:0]) == []


async def test_many_equal_chunks_do_not_hide_each_other(index, collection):
    count = 40
    rows = np.repeat(vectors(1), count, axis=0)
    await index.upsert(collection, [entry(n) for n in range(count)], rows)
    assert await index.missing(collection, [f"c{n}" for n in range(count)], rows) == []


async def test_a_write_larger_than_the_servers_batch_is_whole(index, collection):
    count = 6000
    rows = vectors(count)
    await index.upsert(collection, [entry(n) for n in range(count)], rows)
    some = [0, 999, 1000, 5461, 5999]
    assert await index.missing(collection, [f"c{n}" for n in some], rows[some]) == []


async def test_vectors_of_another_length_are_refused_and_not_worth_trying_again(index, collection):
    await index.upsert(collection, [entry(0)], vectors(1))
    short = np.ones((1, 4), dtype=np.float32) / 2
    with pytest.raises(Conflict, match="dimensions") as refused:
        await index.upsert(collection, [entry(1)], short)
    assert not refused.value.retryable


async def test_a_healthy_index_answers_a_real_query(index):
    await index.check_health()
    await index.check_health()


async def test_searches_and_writes_may_run_at_the_same_time(index, collection):
    rows = vectors(60)
    writes = [index.upsert(collection, [entry(n)], rows[n : n + 1]) for n in range(30)]
    reads = [index.query(collection, rows[:1], 5) for _ in range(30)]
    await asyncio.gather(*writes, *reads)
    assert len(await index.query(collection, rows[:1], 100)) == 30


# --- Chroma alone: what a server can do to us --------------------------------------------------------


async def test_a_collection_that_was_made_again_behind_our_back_is_found(chroma_url, collection):
    ours, other = ChromaIndex(chroma_url), ChromaIndex(chroma_url)
    rows = vectors(2)
    await ours.upsert(collection, [entry(0)], rows[:1])
    await other.drop(collection)
    await other.upsert(collection, [entry(1)], rows[1:])
    assert [hit.entry.chunk_id for hit in await ours.query(collection, rows[:1], 5)] == ["c1"]
    await other.drop(collection)
    await ours.upsert(collection, [entry(0)], rows[:1])
    assert await other.missing(collection, ["c0"], rows[:1]) == []
    await ours.close()
    await other.close()


async def test_a_server_that_is_not_there_is_unavailable():
    index = ChromaIndex(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(Unavailable) as error:
        await index.check_health()
    assert "127.0.0.1" not in error.value.message
    await index.close()


async def test_a_server_that_hangs_is_given_up_in_time_and_its_connection_with_it():
    closed = asyncio.Event()

    async def hang(reader, writer):
        await reader.read(-1)  # until the client hangs up
        closed.set()
        writer.close()

    server = await asyncio.start_server(hang, "127.0.0.1", 0)
    index = ChromaIndex(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", read_timeout_s=0.2)
    started = time.monotonic()
    with pytest.raises(Unavailable, match="within"):
        await index.query("c", vectors(1), 3)
    assert time.monotonic() - started < 1
    await asyncio.wait_for(closed.wait(), 2)
    await index.close()
    server.close()
    await server.wait_closed()


@pytest.mark.parametrize(
    ("status", "text", "expected"),
    [
        (500, '{"error":"InternalError","message":"Error finding id"}', Unavailable),
        (500, '{"error":"InternalError","message":"error returned: (code: 13) database or disk is full"}', StorageFull),
        (503, "", Unavailable),
        (429, "slow down", Unavailable),
    ],
)  # fmt: skip
async def test_a_servers_error_becomes_ours_without_its_text(status, text, expected):
    index = ChromaIndex("http://chroma")
    answer = httpx.MockTransport(lambda _: httpx.Response(status, text=text))
    index._http._client = httpx.AsyncClient(transport=answer)
    with pytest.raises(expected) as error:
        await index.upsert("c", [entry(0)], vectors(1))
    assert type(error.value) is expected
    assert "id" not in error.value.message.split()
    await index.close()
