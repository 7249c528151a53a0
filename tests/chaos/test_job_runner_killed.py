"""kill -9 of job runners in the middle of ingestion: every acknowledged document ends searchable, once."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from redis.asyncio import Redis

from actors.index.memory import MemoryIndex
from actors.ingestion import Embedding, Ingestion
from actors.job_loop import JobLoop, JobLoopConfig
from actors.local_services import ValkeyServer, ValkeyServerConfig
from actors.policies.chunking import Chunking
from actors.policies.ingestion import KIND
from actors.stores.catalog import Catalog
from actors.stores.catalog_records import Attachment, FileRecord
from actors.stores.catalog_stores import StoreSettings
from actors.stores.config import StorageConfig
from actors.stores.documents import DocumentStore
from actors.stores.jobs import JobLog, JobLogConfig
from actors.stores.parsing import ParseLimits, Parser
from actors.stores.redis import connect
from actors.types import Embeddings

T = "acme"
FILES = 12
KILLS = int(os.environ.get("SHOAL_KILLS", "4"))

RUNNER = """
import asyncio, sys
sys.path.insert(0, sys.argv[3])
from actors.stores.redis import connect
from test_job_runner_killed import loop_over
async def main():
    loop_over(connect(sys.argv[1], timeout_s=5), sys.argv[2], slow_s=0.03).start()
    print("running", flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


async def embed(texts: Sequence[str]) -> Embeddings:
    rows = [np.random.default_rng(abs(hash(text)) % 2**32).normal(size=8) for text in texts]
    matrix = np.array([row / np.linalg.norm(row) for row in rows], dtype="<f4")
    return Embeddings(vectors=matrix.tobytes(), dimensions=8, tokens=0)


def loop_over(redis: Redis, documents_url: str, slow_s: float = 0.0) -> JobLoop:
    async def slowly(texts: Sequence[str]) -> Embeddings:
        await asyncio.sleep(slow_s)
        return await embed(texts)

    ingestion = Ingestion(
        DocumentStore(documents_url),
        Catalog(redis),
        MemoryIndex(),
        Parser(ParseLimits()),
        Embedding(embed=slowly, model="m", batch_size=1),
    )
    jobs = JobLog(redis, JobLogConfig(lease_s=0.5))
    return JobLoop(jobs, ingestion, JobLoopConfig(poll_s=0.1, concurrency=4, max_deaths=1000))


@pytest.fixture
def storage():
    folder = Path(tempfile.mkdtemp(prefix="shoal-"))  # short: a socket's path has 107 bytes
    storage = StorageConfig(data_dir=folder)
    server = ValkeyServer(ValkeyServerConfig(storage=storage, max_memory_bytes=32 * 2**20))
    yield storage
    server.stop()
    shutil.rmtree(folder)


async def pieces(data: bytes) -> AsyncIterator[bytes]:
    yield data


@pytest.mark.chaos
@pytest.mark.timeout(60 + 5 * KILLS)
async def test_every_document_survives_runners_that_are_killed(storage):
    url, documents_url = storage.effective_redis_url, storage.effective_documents_url
    async with connect(url, timeout_s=5) as redis:
        catalog, documents, jobs = Catalog(redis), DocumentStore(documents_url), JobLog(redis)
        store = await catalog.stores.create(T, StoreSettings())
        files = []
        for n in range(FILES):
            file_id = catalog.files.new_id()
            stored = await documents.put_source(T, file_id, pieces(f"Document {n}. ".encode() * 300))
            file = FileRecord(id=file_id, filename=f"{n}.txt", bytes=stored.size_bytes, purpose="assistants",
                              created_at=0, sha256=stored.sha256)  # fmt: skip
            files.append(await catalog.files.add(T, file))
        chunking = Chunking(max_chunk_size_tokens=100, chunk_overlap_tokens=0)
        wanted = [(file, Attachment(file_id=file.id, chunking=chunking)) for file in files]
        await catalog.store_files.attach(T, store.id, wanted, jobs)

        for _ in range(KILLS):
            await killed_runner(url, documents_url)
        deaths = [job.deaths async for job in all_jobs(redis, jobs)]
        assert sum(deaths) + (await catalog.stores.get(T, store.id)).counts.completed > 0

        last = loop_over(redis, documents_url)
        last.start()
        async with asyncio.timeout(30):
            while (await jobs.stats(KIND)).pending:
                await asyncio.sleep(0.05)
        await last.stop()

        counts = (await catalog.stores.get(T, store.id)).counts
        assert (counts.completed, counts.total) == (FILES, FILES)
        assert await jobs.dead_letters(KIND) == []
        for record in await catalog.store_files.published(T, store.id):
            assert await documents.list_versions(T, store.id, record.file_id) == [record.version]
            version = await documents.get_version(T, store.id, record.file_id, record.version)
            assert len(version.entry_ids) * 8 * 4 == len(version.embeddings)
        assert len(list((storage.root / "documents").rglob("*.msgpack"))) == FILES


async def killed_runner(redis_url: str, documents_url: str) -> None:
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", RUNNER, redis_url, documents_url, str(Path(__file__).parent),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    while b"running" not in await child.stdout.readline():  # its log lines go to stdout as well
        pass
    await asyncio.sleep(random.uniform(0.1, 1.0))
    os.kill(child.pid, signal.SIGKILL)
    await child.wait()


async def all_jobs(redis, jobs):
    async for key in redis.scan_iter(match=f"shoal:{{jobs:{KIND}}}:job:*"):
        yield await jobs.get(KIND, T, key.decode().rpartition(":")[2])
