"""Ingestion end to end over real stores, a real parser and an index in memory: nothing lost, doubled or orphaned."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence

import fakeredis
import numpy as np
import pytest

from actors.errors import Conflict, EngineFailed, Unavailable
from actors.index.memory import MemoryIndex
from actors.index.protocol import IndexEntry
from actors.ingestion import Embedding, Ingestion
from actors.job_loop import JobLoop, JobLoopConfig
from actors.policies.chunking import Chunking, chunk_of
from actors.policies.ingestion import KIND, IngestionTask, RetryPolicy, after_failure
from actors.stores.catalog import Catalog
from actors.stores.catalog_records import Attachment, FileRecord
from actors.stores.catalog_stores import StoreSettings
from actors.stores.documents import DocumentStore
from actors.stores.jobs import JobLog, JobLogConfig
from actors.stores.parsing import ParseLimits, Parser, ParserKilled
from actors.types import Embeddings

T = "acme"
TEXT = "".join(f"Sentence number {n} talks about topic {n % 7}. " for n in range(300))
SMALL = Chunking(max_chunk_size_tokens=100, chunk_overlap_tokens=20)


class FakeEmbedder:
    """A vector per text that depends on the text alone; may be told to fail or to wait."""

    def __init__(self) -> None:
        self.texts = 0
        self.windows = False
        self.errors: list[Exception] = []
        self.gate: asyncio.Event | None = None
        self.entered = asyncio.Event()

    async def __call__(self, texts: Sequence[str]) -> Embeddings:
        self.entered.set()
        if self.gate is not None:
            await self.gate.wait()
        if self.errors:
            raise self.errors.pop(0)
        self.texts += len(texts)
        counts = tuple(1 + text.count("7") % 3 for text in texts) if self.windows else ()
        texts = [f"{n}{text}" if n else text for text, most in zip(texts, counts or [1] * len(texts), strict=True)
                 for n in range(most)]  # fmt: skip
        rows = [
            np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])).normal(size=16)
            for text in texts
        ]
        matrix = np.array([row / np.linalg.norm(row) for row in rows], dtype="<f4")
        return Embeddings(vectors=matrix.tobytes(), dimensions=16, tokens=len(texts), rows=counts)


class FlakyIndex(MemoryIndex):
    """Raises the next error of `errors` in the named method; may lose what is written; shows what it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: dict[str, list[BaseException]] = {}
        self.loses = 0
        self.held: dict[str, dict[str, IndexEntry]] = {}

    def fail(self, method: str, *errors: BaseException) -> None:
        self.errors[method] = list(errors)

    def _check(self, method: str) -> None:
        if self.errors.get(method):
            raise self.errors[method].pop(0)

    async def upsert(self, collection, entries, embeddings):
        self._check("upsert")
        if self.loses:
            self.loses -= 1
            entries, embeddings = entries[1:], embeddings[1:]
        self.held.setdefault(collection, {}).update({entry.chunk_id: entry for entry in entries})
        await super().upsert(collection, entries, embeddings)

    async def delete_entries(self, collection, chunk_ids):
        self._check("delete_entries")
        self._keep(collection, lambda entry: entry.chunk_id not in chunk_ids)
        await super().delete_entries(collection, chunk_ids)

    async def delete_files(self, collection, file_ids):
        self._check("delete_files")
        self._keep(collection, lambda entry: entry.file_id not in file_ids)
        await super().delete_files(collection, file_ids)

    async def drop(self, collection):
        self.held.pop(collection, None)
        await super().drop(collection)

    def _keep(self, collection, wanted) -> None:
        held = self.held.get(collection, {})
        self.held[collection] = {one: entry for one, entry in held.items() if wanted(entry)}


class Lab:
    """Everything around one ingestion, and what is true of it at the end."""

    def __init__(self, redis, folder) -> None:
        self.redis = redis
        self.catalog = Catalog(redis)
        self.jobs = JobLog(redis, JobLogConfig(lease_s=0.4))
        self.documents = DocumentStore(f"file://{folder}")
        self.index = FlakyIndex()
        self.embed = FakeEmbedder()
        self.parse = Parser(ParseLimits(deadline_s=20))
        self.loops: list[JobLoop] = []

    def ingestion(self) -> Ingestion:
        embedding = Embedding(embed=self.embed, model="fake-16", batch_size=4)
        return Ingestion(self.documents, self.catalog, self.index, self.parse, embedding)

    def runner(self, **config) -> JobLoop:
        loop = JobLoop(self.jobs, self.ingestion(), JobLoopConfig(poll_s=0.1, **config))
        loop.start()
        self.loops.append(loop)
        return loop

    async def upload(self, data: bytes | str = TEXT, name: str = "a.txt") -> FileRecord:
        data = data.encode() if isinstance(data, str) else data

        async def pieces() -> AsyncIterator[bytes]:
            yield data

        file_id = self.catalog.files.new_id()
        stored = await self.documents.put_source(T, file_id, pieces())
        return await self.catalog.files.add(
            T,
            FileRecord(
                id=file_id, filename=name, bytes=stored.size_bytes, purpose="assistants", created_at=0,
                sha256=stored.sha256,
            ),
        )  # fmt: skip

    async def store(self):
        return await self.catalog.stores.create(T, StoreSettings())

    async def attach(self, store, *files, chunking=SMALL, **attributes):
        wanted = [
            (file, Attachment(file_id=file.id, chunking=chunking, attributes=attributes)) for file in files
        ]
        return await self.catalog.store_files.attach(T, store.id, wanted, self.jobs)

    async def status(self, store, file, *wanted: str, within_s: float = 10):
        async def poll():
            while True:
                record = await self.catalog.store_files.get(T, store.id, file.id)
                if record.status in wanted:
                    return record
                await asyncio.sleep(0.02)

        return await asyncio.wait_for(poll(), within_s)

    async def idle(self, within_s: float = 10) -> None:
        async def poll():
            while (await self.jobs.stats(KIND)).pending:
                await asyncio.sleep(0.02)

        await asyncio.wait_for(poll(), within_s)

    def entries(self, store):
        return list(self.index.held.get(store.id, {}).values())

    async def consistent(self, store) -> None:
        """Index and document store hold the published versions and nothing else."""
        _, records = await self.catalog.published(T, store.id)
        wanted = {}
        for record in records:
            assert await self.documents.list_versions(T, store.id, record.file_id) == [record.version]
            version = await self.documents.get_version(T, store.id, record.file_id, record.version)
            wanted |= {one: chunk.text for one, chunk in version.entry_ids}
        assert {entry.chunk_id: entry.text for entry in self.entries(store)} == wanted


@pytest.fixture
async def lab(tmp_path):
    async with fakeredis.FakeAsyncRedis(protocol=2, socket_timeout=None) as redis:
        lab = Lab(redis, tmp_path)
        yield lab
        for loop in lab.loops:
            await loop.stop()


# --- the way it goes ---------------------------------------------------------------------------------


async def test_an_attached_file_becomes_searchable_by_its_own_text(lab):
    lab.runner()
    store, file = await lab.store(), await lab.upload()
    await lab.attach(store, file, lang="en")
    record = await lab.status(store, file, "completed")
    assert (record.progress, record.usage_bytes > len(TEXT)) == (1.0, True)
    await lab.consistent(store)
    version = await lab.documents.get_version(T, store.id, file.id, record.version)
    assert version.text == TEXT
    query = np.frombuffer((await lab.embed([version.chunks[3].text])).vectors, dtype="<f4")[None]
    hit = (await lab.index.query(store.id, query, 1))[0]
    assert (hit.entry.text, hit.entry.filename) == (version.chunks[3].text, "a.txt")
    assert hit.entry.attributes == {"lang": "en"}
    assert TEXT[hit.entry.start :].startswith(hit.entry.text)


class Steps:
    """A gate that lets one call through at a time."""

    def __init__(self) -> None:
        self.open = asyncio.Semaphore(0)

    async def wait(self) -> None:
        await self.open.acquire()


async def test_progress_moves_while_a_file_is_embedded(lab):
    lab.embed.gate = Steps()
    lab.runner()
    store, file = await lab.store(), await lab.upload()
    await lab.attach(store, file)
    seen = []
    while (record := await lab.status(store, file, "in_progress", "completed")).status == "in_progress":
        seen.append(record.progress)
        lab.embed.gate.open.release()
        await asyncio.sleep(0.02)
    assert seen == sorted(seen)
    assert seen[0] == 0.0
    assert len(set(seen)) > 5


async def test_a_chunk_of_several_windows_has_an_entry_for_each(lab):
    lab.embed.windows = True
    lab.runner()
    store, file = await lab.store(), await lab.upload()
    await lab.attach(store, file)
    record = await lab.status(store, file, "completed")
    await lab.consistent(store)
    version = await lab.documents.get_version(T, store.id, file.id, record.version)
    assert len(set(version.rows)) > 1
    ids = [entry.chunk_id for entry in lab.entries(store)]
    assert len(ids) == sum(version.rows)
    assert {chunk_of(one) for one in ids} == {chunk.chunk_id for chunk in version.chunks}
    await lab.catalog.store_files.remove(T, store.id, file.id, lab.jobs)
    await lab.idle()
    assert lab.entries(store) == []


async def test_the_same_bytes_again_are_not_embedded_again(lab):
    lab.runner()
    store, file = await lab.store(), await lab.upload()
    await lab.attach(store, file)
    await lab.status(store, file, "completed")
    embedded, task = (
        lab.embed.texts,
        IngestionTask(action="sync_file", vector_store_id=store.id, file_id=file.id),
    )
    assert await lab.ingestion().run(T, task) == "unchanged"
    await lab.attach(store, file)
    await lab.idle()
    assert lab.embed.texts == embedded
    await lab.consistent(store)


async def test_another_chunking_replaces_the_version_without_an_orphan(lab):
    lab.runner()
    store, file = await lab.store(), await lab.upload()
    await lab.attach(store, file)
    first = await lab.status(store, file, "completed")
    await lab.attach(store, file, chunking=Chunking(max_chunk_size_tokens=300, chunk_overlap_tokens=0))
    second = await lab.status(store, file, "completed")
    await lab.idle()
    assert second.version != first.version
    await lab.consistent(store)


async def test_two_files_with_the_same_bytes_are_two_documents(lab):
    lab.runner()
    store, files = await lab.store(), [await lab.upload(), await lab.upload()]
    await lab.attach(store, *files)
    for file in files:
        await lab.status(store, file, "completed")
    await lab.idle()
    await lab.consistent(store)
    assert {entry.file_id for entry in lab.entries(store)} == {file.id for file in files}


async def test_a_removed_file_leaves_nothing_and_can_come_back(lab):
    lab.runner()
    store, file, other = await lab.store(), await lab.upload(), await lab.upload("Something else.")
    await lab.attach(store, file, other)
    await lab.status(store, file, "completed")
    await lab.status(store, other, "completed")
    await lab.catalog.store_files.remove(T, store.id, file.id, lab.jobs)
    await lab.idle()
    await lab.consistent(store)
    assert {entry.file_id for entry in lab.entries(store)} == {other.id}
    assert await lab.documents.list_versions(T, store.id, file.id) == []
    await lab.attach(store, file)
    await lab.status(store, file, "completed")
    await lab.idle()
    await lab.consistent(store)


async def test_a_deleted_store_and_a_deleted_file_leave_nothing(lab, tmp_path):
    lab.runner()
    store, file = await lab.store(), await lab.upload()
    await lab.attach(store, file)
    await lab.status(store, file, "completed")
    await lab.catalog.delete_store(T, store.id, lab.jobs)
    await lab.catalog.delete_file(T, file.id, lab.jobs)
    await lab.idle()
    assert lab.entries(store) == []
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


async def test_new_attributes_reach_the_index_without_embedding(lab):
    lab.runner()
    store, file = await lab.store(), await lab.upload()
    await lab.attach(store, file)
    await lab.status(store, file, "completed")
    embedded = lab.embed.texts
    await lab.catalog.store_files.set_attributes(T, store.id, file.id, {"year": 2024}, lab.jobs)
    await lab.idle()
    assert {entry.attributes["year"] for entry in lab.entries(store)} == {2024}
    assert lab.embed.texts == embedded


# --- bad documents -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "name", "code", "part"),
    [
        (b"", "a.txt", "invalid_file", "empty"),
        (b"MZ\x00", "a.exe", "unsupported_file", "allowed"),
        (b"%PDF-1.4 broken", "a.pdf", "invalid_file", "damaged"),
        (b"\x01 \x02", "a", "unsupported_file", "binary"),
    ],
)
async def test_a_bad_document_fails_at_once_and_alone(lab, data, name, code, part):
    lab.runner()
    store, bad, good = await lab.store(), await lab.upload(data, name), await lab.upload()
    await lab.attach(store, bad, good)
    record = await lab.status(store, bad, "failed")
    assert (record.last_error.code, part in record.last_error.message) == (code, True)
    await lab.status(store, good, "completed")
    await lab.idle()
    await lab.consistent(store)


async def test_a_file_whose_bytes_or_record_are_gone_fails_and_says_so(lab):
    store, file, gone = await lab.store(), await lab.upload(), await lab.upload()
    await lab.documents.delete_source(T, file.id)
    await lab.attach(store, file, gone)
    await lab.redis.delete(f"shoal:{{{T}}}:file:{gone.id}")
    lab.runner()
    assert "gone" in (await lab.status(store, file, "failed")).last_error.message
    assert "deleted" in (await lab.status(store, gone, "failed")).last_error.message


# --- parts that fail ---------------------------------------------------------------------------------


async def test_what_is_down_is_tried_again_until_it_is_back(lab):
    lab.embed.errors = [Unavailable("embedder down"), Unavailable("embedder down")]
    lab.index.fail("upsert", Unavailable("index down"))
    lab.runner()
    store, file = await lab.store(), await lab.upload()
    await lab.attach(store, file)
    await lab.status(store, file, "completed", within_s=20)
    await lab.consistent(store)
    assert (await lab.jobs.dead_letters(KIND)) == []


async def test_a_crash_after_the_version_was_written_does_not_embed_again(lab):
    store, file = await lab.store(), await lab.upload()
    await lab.attach(store, file)
    lab.index.fail("upsert", RuntimeError("killed here"))
    task = IngestionTask(action="sync_file", vector_store_id=store.id, file_id=file.id)
    with pytest.raises(RuntimeError):
        await lab.ingestion().run(T, task)
    embedded = lab.embed.texts
    assert await lab.ingestion().run(T, task) == "published"
    assert lab.embed.texts == embedded
    await lab.consistent(store)


async def test_a_crash_after_publishing_still_removes_the_old_version(lab):
    store, file = await lab.store(), await lab.upload()
    task = IngestionTask(action="sync_file", vector_store_id=store.id, file_id=file.id)
    await lab.attach(store, file)
    await lab.ingestion().run(T, task)
    await lab.attach(store, file, chunking=Chunking(max_chunk_size_tokens=300, chunk_overlap_tokens=0))
    lab.index.fail("delete_entries", RuntimeError("killed here"))
    with pytest.raises(RuntimeError):
        await lab.ingestion().run(T, task)
    assert (await lab.status(store, file, "completed")).version
    assert await lab.ingestion().run(T, task) == "unchanged"
    await lab.consistent(store)


async def test_chunks_that_the_index_lost_are_noticed_and_written_again(lab):
    lab.index.loses = 1
    lab.runner()
    store, file = await lab.store(), await lab.upload("One short sentence.")
    await lab.attach(store, file)
    await lab.status(store, file, "completed", within_s=20)
    await lab.consistent(store)


async def test_a_killed_parser_is_no_fault_of_the_document(lab):
    real, calls = lab.parse, []

    async def killed_once(source, filename):
        calls.append(filename)
        if len(calls) == 1:
            raise ParserKilled("killed")
        return await real(source, filename)

    lab.parse = killed_once
    lab.runner()
    store, file = await lab.store(), await lab.upload()
    await lab.attach(store, file)
    await lab.status(store, file, "completed", within_s=20)


async def test_an_unforeseen_error_ends_as_a_failed_file_and_a_dead_letter(lab):
    async def broken(_source, _filename):
        raise RuntimeError("secret detail")

    lab.parse = broken
    lab.runner(max_failures=2)
    store, file = await lab.store(), await lab.upload()
    await lab.attach(store, file)
    record = await lab.status(store, file, "failed", within_s=20)
    assert record.last_error.code == "server_error"
    assert "secret" not in record.last_error.message
    await lab.idle()
    assert len(await lab.jobs.dead_letters(KIND)) == 1


async def test_an_error_that_no_retry_helps_fails_at_once(lab):
    lab.index.fail("upsert", Conflict("the collection holds vectors of 8 dimensions"))
    lab.runner()
    store, file = await lab.store(), await lab.upload()
    await lab.attach(store, file)
    record = await lab.status(store, file, "failed")
    assert "8 dimensions" in record.last_error.message


async def test_a_job_from_another_version_is_put_aside(lab):
    lab.runner()
    await lab.jobs.enqueue(KIND, T, {"action": "dance"})
    await lab.idle()
    assert len(await lab.jobs.dead_letters(KIND)) == 1


# --- runners that die --------------------------------------------------------------------------------


async def kill(loop: JobLoop) -> None:
    """As kill -9: no lease is given back."""
    tasks = [*loop._loops, *loop._active]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    loop._active.clear()


async def test_a_runner_that_stops_gives_its_jobs_back_at_once_and_unharmed(lab):
    lab.embed.gate = asyncio.Event()
    first = lab.runner()
    store, file = await lab.store(), await lab.upload()
    await lab.attach(store, file)
    await lab.embed.entered.wait()
    await first.stop()
    [lease] = (await lab.jobs.lease(KIND, "next", 1)).leases
    assert (lease.deaths, lease.failures, lease.attempts) == (0, 0, 2)


async def test_another_runner_finishes_what_a_dead_one_began(lab):
    lab.embed.gate = asyncio.Event()
    first = lab.runner()
    store, file = await lab.store(), await lab.upload()
    await lab.attach(store, file)
    await lab.embed.entered.wait()
    await kill(first)
    lab.embed.gate.set()
    lab.runner()
    await lab.status(store, file, "completed")
    await lab.idle()
    await lab.consistent(store)


async def test_a_document_that_kills_three_runners_is_given_up_and_others_go_on(lab):
    lab.embed.gate = asyncio.Event()
    store, poison = await lab.store(), await lab.upload("Poison. " * 50)
    await lab.attach(store, poison)
    for _ in range(3):
        lab.embed.entered.clear()
        loop = lab.runner()
        await asyncio.wait_for(lab.embed.entered.wait(), 5)
        await kill(loop)
    lab.embed.gate.set()
    good = await lab.upload()
    await lab.attach(store, good)
    lab.runner()
    await lab.status(store, good, "completed")
    record = await lab.status(store, poison, "failed")
    assert "died" in record.last_error.message
    assert [job.deaths for job in await lab.jobs.dead_letters(KIND)] == [3]


async def test_a_long_job_keeps_its_lease(lab):
    lab.embed.gate = asyncio.Event()
    lab.runner()
    lab.runner()
    store, file = await lab.store(), await lab.upload()
    await lab.attach(store, file)
    await asyncio.sleep(1.2)  # three times the lease
    lab.embed.gate.set()
    await lab.status(store, file, "completed")
    record = await lab.jobs.get(KIND, T, await _only_job(lab))
    assert (record.attempts, record.deaths) == (1, 0)


async def _only_job(lab) -> str:
    [key] = [key async for key in lab.redis.scan_iter(match="shoal:{jobs:ingestion}:job:*")]
    return key.decode().rpartition(":")[2]


async def test_a_runner_whose_lease_is_lost_stops_and_harms_nothing(lab):
    lab.embed.gate = asyncio.Event()
    lab.runner()
    store, file = await lab.store(), await lab.upload()
    await lab.attach(store, file)
    await lab.embed.entered.wait()
    await lab.redis.hincrby(f"shoal:{{jobs:{KIND}}}:job:{await _only_job(lab)}", "epoch", 1)
    await asyncio.sleep(0.3)
    assert not lab.loops[0]._active
    lab.embed.gate.set()
    await lab.status(store, file, "completed")
    await lab.idle()
    await lab.consistent(store)


# --- changes while it runs ---------------------------------------------------------------------------


async def test_a_file_removed_while_it_is_ingested_leaves_nothing(lab):
    lab.embed.gate = asyncio.Event()
    lab.runner()
    store, file = await lab.store(), await lab.upload()
    await lab.attach(store, file)
    await lab.embed.entered.wait()
    await lab.catalog.store_files.remove(T, store.id, file.id, lab.jobs)
    lab.embed.gate.set()
    await lab.idle()
    assert lab.entries(store) == []
    assert await lab.documents.list_versions(T, store.id, file.id) == []


async def test_a_file_removed_and_attached_again_while_it_is_ingested_ends_published(lab):
    lab.embed.gate = asyncio.Event()
    lab.runner()
    lab.runner()
    store, file = await lab.store(), await lab.upload()
    await lab.attach(store, file)
    await lab.embed.entered.wait()
    await lab.catalog.store_files.remove(T, store.id, file.id, lab.jobs)
    await lab.attach(store, file, chunking=Chunking(max_chunk_size_tokens=200, chunk_overlap_tokens=0))
    lab.embed.gate.set()
    await lab.status(store, file, "completed")
    await lab.idle()
    await lab.consistent(store)


async def test_a_store_deleted_while_a_file_is_ingested_leaves_nothing(lab, tmp_path):
    lab.embed.gate = asyncio.Event()
    lab.runner()
    store, file = await lab.store(), await lab.upload()
    await lab.attach(store, file)
    await lab.embed.entered.wait()
    await lab.catalog.delete_store(T, store.id, lab.jobs)
    lab.embed.gate.set()
    await lab.idle()
    assert store.id not in lab.index.held
    assert list((tmp_path / T).glob("versions/*/*/*")) == []
    assert [key async for key in lab.redis.scan_iter(match=f"*{store.id}*")] == []


async def test_a_cancelled_batch_stops_what_is_not_done(lab):
    lab.embed.gate = asyncio.Event()
    lab.runner()
    store, files = await lab.store(), [await lab.upload(f"{n} {TEXT}") for n in range(3)]
    await lab.attach(store, *files)
    batch = await lab.catalog.batches.create(T, store.id, [file.id for file in files])
    await lab.embed.entered.wait()
    cancelled = await lab.catalog.batches.cancel(T, store.id, batch.id)
    assert cancelled.status == "cancelled"
    lab.embed.gate.set()
    await lab.idle()
    await lab.consistent(store)
    assert (await lab.catalog.batches.get(T, store.id, batch.id)).counts.cancelled == 3


# --- the runner --------------------------------------------------------------------------------------


async def test_a_redis_outage_is_waited_out(lab):
    loop = lab.runner()
    real, fails = lab.jobs.lease, [Unavailable("away"), Unavailable("away")]

    async def flaky(*args):
        if fails:
            raise fails.pop()
        return await real(*args)

    lab.jobs.lease = flaky
    store, file = await lab.store(), await lab.upload()
    await lab.attach(store, file)
    await lab.status(store, file, "completed")
    await loop.check_health()


async def test_health_fails_once_the_loop_is_gone(lab):
    loop = lab.runner()
    await loop.check_health()
    loop._loops[0].cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    with pytest.raises(Unavailable):
        await loop.check_health()


# --- the policy --------------------------------------------------------------------------------------

POLICY = RetryPolicy(base_s=1, most_s=8, give_up_after_s=100, max_failures=3)


@pytest.mark.parametrize(
    ("error", "failures", "age_s", "delay_s"),
    [
        (Unavailable("x"), 0, 0, 1.0),
        (Unavailable("x"), 2, 0, 4.0),
        (Unavailable("x"), 50, 99, 8.0),
        (Unavailable("x", retry_after_s=20), 0, 0, 20.0),
        (Unavailable("x"), 0, 101, None),
        (Conflict("x"), 0, 0, None),
        (RuntimeError("x"), 1, 0, 2.0),
        (EngineFailed("x"), 2, 0, None),
        (RuntimeError("x"), 2, 0, None),
    ],
)
def test_patience_is_bounded_by_time_for_outages_and_by_tries_for_surprises(error, failures, age_s, delay_s):
    assert after_failure(error, failures=failures, age_s=age_s, jitter=1.0, policy=POLICY) == delay_s


def test_jitter_spreads_retries_and_never_spins():
    delays = [
        after_failure(Unavailable("x"), failures=0, age_s=0, jitter=jitter, policy=POLICY)
        for jitter in (0.0, 0.5)
    ]
    assert delays == [0.1, pytest.approx(0.55)]
