"""`JobRunner` put together over a real Valkey, a real Chroma and the scripted embedding model; only Ray is missing."""

from __future__ import annotations

import asyncio
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from actors.embedder import Embedder, EmbedderConfig
from actors.errors import Unavailable
from actors.handles.embedder import EmbedderClient
from actors.index.chroma import ChromaIndex
from actors.job_runner import JobRunner, JobRunnerConfig
from actors.local_services import ChromaServer, ChromaServerConfig, ValkeyServer, ValkeyServerConfig
from actors.policies.chunking import Chunking, chunk_of
from actors.policies.ingestion import KIND
from actors.policies.load import LoadSnapshot
from actors.stores.catalog import Catalog
from actors.stores.catalog_records import Attachment, FileRecord
from actors.stores.catalog_stores import StoreSettings
from actors.stores.config import StorageConfig
from actors.stores.documents import DocumentStore
from actors.stores.jobs import JobLog, JobLogConfig
from actors.stores.redis import connect
from app.batch_lines import BatchLines

T = "acme"
TEXT = "".join(f"Sentence {n} is about topic {n * n}. " for n in range(120))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def storage():
    folder = Path(tempfile.mkdtemp(prefix="shoal-"))  # short: a socket's path has 107 bytes
    storage = StorageConfig(data_dir=folder, chroma_port=free_port())
    servers = [
        ValkeyServer(ValkeyServerConfig(storage=storage, max_memory_bytes=32 * 2**20)),
        ChromaServer(ChromaServerConfig(storage=storage)),
    ]
    yield storage
    for server in servers:
        server.stop()
    shutil.rmtree(folder)


@pytest.fixture
def embedder(monkeypatch):
    """The embedder in this process behind its client; away for the first question about what it is."""
    actor = Embedder(EmbedderConfig(model="scripted"))
    away = [Unavailable("the embedder is starting")]

    async def embed(_client, inputs, *, timeout_s, kind="passage", dimensions=None, pool=True):
        return await actor.embed(inputs, kind, dimensions=dimensions, pool=pool)

    async def info(_client, *, timeout_s):
        if away:
            raise away.pop()
        return await actor.info()

    monkeypatch.setattr(EmbedderClient, "embed", embed)
    monkeypatch.setattr(EmbedderClient, "info", info)
    return actor


async def pieces(data: bytes) -> AsyncIterator[bytes]:
    yield data


class Runner(JobRunner):
    """Without Serve, which awaits the destructor, the garbage collector would call it and await nothing."""

    def __del__(self) -> None:
        return


@pytest.mark.local
async def test_a_runner_ingests_into_chroma_what_was_attached_before_it_came(storage, embedder):
    async with connect(storage.effective_redis_url, timeout_s=5) as redis:
        catalog, jobs = Catalog(redis), JobLog(redis)
        documents = DocumentStore(storage.effective_documents_url)
        store, file_id = await catalog.stores.create(T, StoreSettings()), catalog.files.new_id()
        stored = await documents.put_source(T, file_id, pieces(TEXT.encode()))
        file = await catalog.files.add(
            T,
            FileRecord(
                id=file_id, filename="a.txt", bytes=stored.size_bytes, purpose="assistants", created_at=0,
                sha256=stored.sha256,
            ),
        )  # fmt: skip
        chunking = Chunking(max_chunk_size_tokens=400, chunk_overlap_tokens=0)
        wanted = [(file, Attachment(file_id=file_id, chunking=chunking, attributes={"n": 1}))]
        await catalog.store_files.attach(T, store.id, wanted, jobs)

        config = JobRunnerConfig(storage=storage, poll_s=0.2, jobs=JobLogConfig(lease_s=2))
        runner = Runner(config, BatchLines)
        await runner.check_health()
        assert LoadSnapshot.from_stats(await runner.record_autoscaling_stats()).queued == 1.0
        async with asyncio.timeout(20):
            while (await jobs.stats(KIND)).pending:
                await asyncio.sleep(0.05)
        await runner.check_health()
        record = await catalog.store_files.get(T, store.id, file_id)
        assert (record.status, record.last_error) == ("completed", None)

        version = await documents.get_version(T, store.id, file_id, record.version)
        assert max(version.rows) > 1, "chunks are longer than the model's window: each has several vectors"
        index = ChromaIndex(storage.effective_chroma_url)
        question = (await embedder.embed([version.chunks[1].text[-200:]], "query")).vectors
        hits = await index.query(store.id, np.frombuffer(question, dtype="<f4")[None], 100)
        assert len(hits) == len(version.entry_ids)
        assert chunk_of(hits[0].entry.chunk_id) == version.chunks[1].chunk_id
        await catalog.store_files.remove(T, store.id, file_id, jobs)
        async with asyncio.timeout(20):
            while (await jobs.stats(KIND)).pending:
                await asyncio.sleep(0.05)
        assert await index.query(store.id, np.frombuffer(question, dtype="<f4")[None], 5) == []
        await index.close()
        await runner.aclose()
