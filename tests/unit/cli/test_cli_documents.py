"""`shoal ingest` against the real document routes, stores, parser and job loop, over HTTP; no Ray, no Chroma."""

import asyncio
import hashlib
import json
import threading
from types import SimpleNamespace

import fakeredis
import numpy as np
import pytest
import uvicorn
from rich.progress import Progress

from actors.index.memory import MemoryIndex
from actors.ingestion import Embedding, Ingestion
from actors.job_loop import JobLoop, JobLoopConfig
from actors.stores.catalog import Catalog
from actors.stores.documents import DocumentStore
from actors.stores.jobs import JobLog
from actors.stores.keys import AuthConfig, open_key
from actors.stores.parsing import ParseLimits, Parser
from actors.types import Embeddings, ModelCard
from app.api import build_api
from app.api.deps import gateway_service


async def embed(texts):
    """A vector per text; slow enough that progress is seen between two calls."""
    await asyncio.sleep(0.1)
    digests = [hashlib.sha256(text.encode()).digest() for text in texts]
    rows = np.array([list(digest) for digest in digests], dtype="<f4")
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return Embeddings(vectors=rows.tobytes(), dimensions=rows.shape[1], tokens=len(texts))


class FakeGateway:
    """Open mode, no models, real stores."""

    def __init__(self, redis, folder):
        self.config = SimpleNamespace(max_body_bytes=10**7, max_upload_bytes=10**7, expose_docs=False)
        self.catalog, self.jobs = Catalog(redis), JobLog(redis)
        self.documents = DocumentStore(f"file://{folder}")

    async def authenticate(self, authorization, clock):
        return open_key(AuthConfig(mode="open"))

    async def ready(self):
        return {"gateway": "ready"}

    async def models(self):
        return [ModelCard(name="m", context_tokens=0, tokenizer="")]


@pytest.fixture
def system(tmp_path):
    """The whole document side of Shoal in a thread; gives its URL and gateway."""
    found, up, stop = SimpleNamespace(), threading.Event(), threading.Event()

    async def serve():
        async with fakeredis.FakeAsyncRedis(protocol=2, socket_timeout=None) as redis:
            found.gateway = gateway = FakeGateway(redis, tmp_path / "documents")
            embedding = Embedding(embed=embed, model="bytes", batch_size=2)
            work = Ingestion(
                gateway.documents, gateway.catalog, MemoryIndex(), Parser(ParseLimits()), embedding
            )
            loop = JobLoop(gateway.jobs, work, JobLoopConfig(poll_s=0.1))
            loop.start()
            app = build_api()
            app.dependency_overrides[gateway_service] = lambda: gateway
            config = uvicorn.Config(
                app, host="127.0.0.1", port=0, log_level="error", ws="none", lifespan="off"
            )
            server = uvicorn.Server(config)
            serving = asyncio.create_task(server.serve())
            while not server.started:
                await asyncio.sleep(0.01)
            found.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
            up.set()
            await asyncio.to_thread(stop.wait)
            server.should_exit = True
            await serving
            await loop.stop()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert up.wait(20)
    yield found
    stop.set()
    thread.join()


@pytest.fixture
def docs(tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "long.md").write_text(
        "\n\n".join(f"Chapter {n}. " + f"Fish {n} swim. " * 150 for n in range(12))
    )
    (folder / "short.txt").write_text("Whales sing.")
    (folder / "page.html").write_text("<html><body><p>Bread is baked.</p></body></html>")
    return folder


def store_of(run, url):
    (store,) = json.loads(run("status", "--json", "--url", url).stdout)["vector_stores"]
    return store


def test_documents_are_ingested_and_the_bar_moves_with_their_chunks(system, run, docs, monkeypatch):
    shown = []
    update = Progress.update

    def record(self, *args, completed=None, **more):
        shown.append(completed)
        update(self, *args, completed=completed, **more)

    monkeypatch.setattr(Progress, "update", record)
    result = run("ingest", docs, "--store", "notes", "--url", system.url)
    assert result.exit_code == 0, result.output
    assert "3 completed" in result.stdout
    assert shown[-1] == 3
    assert any(share % 1 for share in shown), shown  # within a document, not only after each
    assert store_of(run, system.url)["file_counts"]["completed"] == 3


def test_a_second_run_changes_nothing_and_a_changed_file_replaces_its_version(system, run, docs):
    words = ("ingest", docs, "--store", "notes", "--url", system.url)
    assert run(*words).exit_code == 0
    before = store_of(run, system.url)
    assert "3 unchanged" in run(*words).stdout
    assert store_of(run, system.url) | {"last_active_at": 0} == before | {"last_active_at": 0}
    (docs / "short.txt").write_text("Whales sing louder.")
    assert "1 completed, 2 unchanged" in run(*words).stdout
    assert store_of(run, system.url)["file_counts"]["total"] == 3
    assert store_of(run, system.url)["id"] == before["id"]


def test_files_that_cannot_be_read_are_named_with_the_servers_reason(system, run, docs):
    (docs / "empty.md").touch()
    (docs / "fake.pdf").write_text("no PDF at all")
    result = run("ingest", docs, "--store", "notes", "--url", system.url)
    assert result.exit_code == 1
    assert "3 completed, 2 failed" in result.stdout
    assert "failed  empty.md: the file is empty" in result.stderr
    assert "failed  fake.pdf: the file is named .pdf and is no PDF" in result.stderr
