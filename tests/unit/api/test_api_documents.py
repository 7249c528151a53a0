"""Files and vector stores over HTTP, by the official client and by hand, over real stores and a real runner."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from types import SimpleNamespace

import fakeredis
import httpx
import numpy as np
import openai
import pytest

from actors.index.memory import MemoryIndex
from actors.ingestion import Embedding, Ingestion
from actors.job_loop import JobLoop, JobLoopConfig
from actors.policies.filters import parse_filter
from actors.stores.catalog import Catalog
from actors.stores.documents import DocumentStore
from actors.stores.jobs import JobLog
from actors.stores.parsing import ParseLimits, Parser
from actors.types import Embeddings, Passage, Principal, RetrievalQuery, RetrievalResult

WHALES = b"Whales sing in the deep sea. They are mammals."
BREAD = b"Bread is baked from flour and water in an oven."


async def embed(texts: Sequence[str]) -> Embeddings:
    """Bags of words, so that texts with common words are near."""
    matrix = np.zeros((len(texts), 64), dtype="<f4")
    for row, text in zip(matrix, texts, strict=True):
        for word in text.lower().replace(".", "").split():
            row[hashlib.sha256(word.encode()).digest()[0] % 64] += 1
    matrix /= np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1)
    return Embeddings(vectors=matrix.tobytes(), dimensions=64, tokens=len(texts))


class Search:
    """The least that a retriever is: dense search over what is published."""

    def __init__(self, catalog: Catalog, index: MemoryIndex) -> None:
        self._catalog, self._index = catalog, index
        self.queries: list[RetrievalQuery] = []
        self.degraded = ""

    async def __call__(self, principal: Principal, query: RetrievalQuery, clock=None) -> RetrievalResult:
        self.queries.append(query)
        [store_id] = query.vector_store_ids
        _, records = await self._catalog.published(principal.tenant, store_id)
        attributes = {record.file_id: record.attributes for record in records}
        passes = parse_filter(query.filters)
        vectors = (await embed([query.text])).vectors
        hits = await self._index.query(store_id, np.frombuffer(vectors, dtype="<f4")[None], 50)
        passages = [
            Passage(
                chunk_id=hit.entry.chunk_id,
                file_id=hit.entry.file_id,
                filename=hit.entry.filename,
                vector_store_id=store_id,
                text=hit.entry.text,
                score=hit.score,
                attributes=attributes[hit.entry.file_id],
            )
            for hit in hits
            if hit.entry.file_id in attributes
            and passes(attributes[hit.entry.file_id])
            and hit.score >= query.score_threshold
        ]
        return RetrievalResult(passages=tuple(passages[: query.max_num_results]), degraded=self.degraded)


@pytest.fixture
async def services(gateway, tmp_path, monkeypatch):
    (tmp_path / "spool").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "spool"))
    async with fakeredis.FakeAsyncRedis(protocol=2, socket_timeout=None) as redis:
        gateway.catalog = Catalog(redis)
        gateway.documents = DocumentStore(f"file://{tmp_path}/docs")
        gateway.jobs = JobLog(redis)
        index = MemoryIndex()
        gateway.search = Search(gateway.catalog, index)
        embedding = Embedding(embed=embed, model="words")
        ingestion = Ingestion(gateway.documents, gateway.catalog, index, Parser(ParseLimits()), embedding)
        loop = JobLoop(gateway.jobs, ingestion, JobLoopConfig(poll_s=0.1))
        loop.start()
        yield gateway
        await loop.stop()


@pytest.fixture(autouse=True)
def _needed(services):
    """Every test here has them."""


async def upload(client, data=WHALES, name="whales.txt", purpose="assistants"):
    return await client.files.create(file=(name, data), purpose=purpose)


# --- the official client -----------------------------------------------------------------------------


async def test_a_file_is_uploaded_listed_read_and_deleted(client):
    file = await upload(client)
    assert (file.object, file.bytes, file.filename) == ("file", len(WHALES), "whales.txt")
    assert (file.purpose, file.status) == ("assistants", "processed")
    assert file.sha256 == hashlib.sha256(WHALES).hexdigest()
    assert await client.files.retrieve(file.id) == file
    assert [one.id async for one in client.files.list(purpose="assistants")] == [file.id]
    assert [one.id async for one in client.files.list(purpose="batch")] == []
    assert (await client.files.content(file.id)).content == WHALES
    assert (await client.files.delete(file.id)).deleted
    with pytest.raises(openai.NotFoundError):
        await client.files.retrieve(file.id)


async def test_upload_and_poll_search_and_content(client):
    store = await client.vector_stores.create(name="docs", metadata={"team": "sea"})
    assert (store.status, store.file_counts.total, store.metadata) == ("completed", 0, {"team": "sea"})
    for name, data in (("whales.txt", WHALES), ("bread.md", BREAD)):
        file = await client.vector_stores.files.upload_and_poll(
            vector_store_id=store.id, file=(name, data), attributes={"name": name, "size": len(data)}
        )
        assert (file.status, file.last_error, file.progress) == ("completed", None, 1.0)
        assert file.chunking_strategy.static.max_chunk_size_tokens == 800
    store = await client.vector_stores.retrieve(store.id)
    assert (store.file_counts.completed, store.usage_bytes > 0) == (2, True)
    page = await client.vector_stores.search(store.id, query="who sings in the sea", max_num_results=1)
    [found] = page.data
    assert (found.filename, found.attributes["name"]) == ("whales.txt", "whales.txt")
    assert found.content[0].text == WHALES.decode()
    content = await client.vector_stores.files.content(found.file_id, vector_store_id=store.id)
    assert content.data[0].text == WHALES.decode()


async def test_create_and_poll_of_a_bad_document_tells_why(client):
    store = await client.vector_stores.create()
    file = await upload(client, b"MZ\x00\x01", "setup.exe")
    failed = await client.vector_stores.files.create_and_poll(file.id, vector_store_id=store.id)
    assert (failed.status, failed.last_error.code) == ("failed", "unsupported_file")
    assert "allowed: PDF, DOCX" in failed.last_error.message
    listed = [one.id async for one in client.vector_stores.files.list(store.id, filter="failed")]
    assert listed == [file.id]


async def test_a_store_is_made_with_files_changed_listed_and_deleted(client):
    file = await upload(client)
    static = {"max_chunk_size_tokens": 200, "chunk_overlap_tokens": 50}
    store = await client.vector_stores.create(
        file_ids=[file.id],
        chunking_strategy={"type": "static", "static": static},
        expires_after={"anchor": "last_active_at", "days": 3},
    )
    attached = await client.vector_stores.files.poll(file.id, vector_store_id=store.id)
    assert attached.chunking_strategy.static.model_dump() == static
    assert store.expires_at == store.last_active_at + 3 * 86_400
    changed = await client.vector_stores.update(store.id, name="new", metadata={"k": "v"})
    assert (changed.name, changed.metadata, changed.expires_after.days) == ("new", {"k": "v"}, 3)
    cleared = await client.vector_stores.update(store.id, expires_after=None)
    assert (cleared.name, cleared.expires_after, cleared.expires_at) == ("new", None, None)
    assert [one.id async for one in client.vector_stores.list()] == [store.id]
    assert (await client.vector_stores.delete(store.id)).deleted
    with pytest.raises(openai.NotFoundError):
        await client.vector_stores.search(store.id, query="x")
    assert (await client.files.retrieve(file.id)).id == file.id


async def test_attributes_are_changed_and_filtered_by(client):
    store = await client.vector_stores.create()
    file = await client.vector_stores.files.upload_and_poll(vector_store_id=store.id, file=("a.txt", WHALES))
    await client.vector_stores.files.update(
        file.id, vector_store_id=store.id, attributes={"year": 2024, "draft": False}
    )
    got = await client.vector_stores.files.retrieve(file.id, vector_store_id=store.id)
    assert got.attributes == {"year": 2024, "draft": False}

    async def found(year: int) -> int:
        rule = {"type": "gte", "key": "year", "value": year}
        return len((await client.vector_stores.search(store.id, query="whales", filters=rule)).data)

    assert (await found(2024), await found(2025)) == (1, 0)


async def test_a_deleted_file_is_not_found_by_searches(client):
    store = await client.vector_stores.create()
    files = [
        await client.vector_stores.files.upload_and_poll(vector_store_id=store.id, file=(f"{n}.txt", WHALES))
        for n in range(2)
    ]
    assert (await client.vector_stores.files.delete(files[0].id, vector_store_id=store.id)).deleted
    found = await client.vector_stores.search(store.id, query="whales")
    assert {one.file_id for one in found.data} == {files[1].id}
    await client.files.delete(files[1].id)
    assert (await client.vector_stores.search(store.id, query="whales")).data == []
    assert (await client.vector_stores.retrieve(store.id)).file_counts.total == 0


async def test_file_batches_work_with_ids_and_with_files(client):
    store = await client.vector_stores.create()
    files = [await upload(client, data, f"{n}.txt") for n, data in enumerate((WHALES, BREAD, b"\x00\x01"))]
    batch = await client.vector_stores.file_batches.create_and_poll(
        store.id, file_ids=[file.id for file in files]
    )
    assert (batch.status, batch.object) == ("completed", "vector_store.files_batch")
    assert (batch.file_counts.completed, batch.file_counts.failed, batch.file_counts.total) == (2, 1, 3)
    listed = client.vector_stores.file_batches.list_files(batch.id, vector_store_id=store.id, limit=2)
    assert sorted([one.id async for one in listed]) == sorted(file.id for file in files)
    other = await client.vector_stores.create()
    each = [{"file_id": files[0].id, "attributes": {"n": 1}}, {"file_id": files[1].id}]
    batch = await client.vector_stores.file_batches.create(other.id, files=each)
    cancelled = await client.vector_stores.file_batches.cancel(batch.id, vector_store_id=other.id)
    assert cancelled.file_counts.in_progress == 0
    got = await client.vector_stores.file_batches.retrieve(batch.id, vector_store_id=other.id)
    assert got.file_counts.total == 2


async def test_pages_follow_the_clients_cursors_even_while_it_deletes(client):
    for n in range(7):
        await upload(client, b"x", f"{n}.txt")
    names = []
    async for file in client.files.list(limit=3, order="asc"):
        names.append(file.filename)
        await client.files.delete(file.id)
    assert names == [f"{n}.txt" for n in range(7)]


async def test_several_queries_are_merged_and_degradation_is_said(client, services):
    store = await client.vector_stores.create()
    for name, data in (("w.txt", WHALES), ("b.txt", BREAD)):
        await client.vector_stores.files.upload_and_poll(vector_store_id=store.id, file=(name, data))
    services.search.degraded = "vector=timeout"
    raw = await client.vector_stores.with_raw_response.search(
        store.id,
        query=["whales sing", "bread flour"],
        max_num_results=2,
        rewrite_query=False,
        ranking_options={"ranker": "none", "score_threshold": 0.05},
    )
    body = json.loads(raw.text)
    assert raw.headers["x-shoal-degraded"] == "vector=timeout"
    assert body["search_query"] == ["whales sing", "bread flour"]
    assert {one["filename"] for one in body["data"]} == {"w.txt", "b.txt"}
    assert {query.score_threshold for query in services.search.queries} == {0.05}


# --- bad input ---------------------------------------------------------------------------------------


async def refused(http: httpx.AsyncClient, method: str, path: str, status: int, **more) -> dict:
    response = await http.request(method, path, **more)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("parts", "param", "says"),
    [
        ({"files": {"file": ("a.txt", b"x")}}, "purpose", "assistants, user_data, batch"),
        (
            {"files": {"file": ("a.txt", b"x")}, "data": {"purpose": "fine-tune"}},
            "purpose",
            "got 'fine-tune'",
        ),
        ({"files": {"file": ("a.txt", b"")}, "data": {"purpose": "assistants"}}, "file", "empty"),
        ({"files": {"x": ("a", b"x")}, "data": {"purpose": "assistants"}}, "file", "must be a file"),
        ({"data": {"purpose": "assistants"}, "files": {"file": (None, b"x")}}, "file", "must be a file"),
        (
            {
                "files": {"file": ("a.txt", b"x")},
                "data": {"purpose": "assistants", "expires_after[anchor]": "created_at"},
            },
            "expires_after[anchor]",
            "not supported",
        ),
        ({"json": {"purpose": "assistants"}}, "Content-Type", "multipart/form-data"),
        (
            {"content": b"--x\r\nbroken", "headers": {"content-type": "multipart/form-data; boundary=y"}},
            None,
            "",
        ),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, None, "boundary"),
    ],
)
async def test_an_upload_that_is_none_is_refused_by_name(http, services, parts, param, says):
    error = await refused(http, "POST", "/v1/files", 400, **parts)
    assert (error["param"], says in error["message"]) == (param, True), error
    assert (await http.get("/v1/files")).json()["data"] == []


async def test_an_upload_over_the_limit_is_413_and_leaves_nothing(http, gateway, tmp_path):
    gateway.config = SimpleNamespace(max_body_bytes=1000, max_upload_bytes=100_000, expose_docs=False)
    parts = {"files": {"file": ("a.txt", b"x" * 200_000)}, "data": {"purpose": "assistants"}}
    error = await refused(http, "POST", "/v1/files", 413, **parts)
    assert "100000" in error["message"]
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
    fits = {"files": {"file": ("a.txt", b"x" * 50_000)}, "data": {"purpose": "assistants"}}
    assert (await http.post("/v1/files", **fits)).status_code == 200


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\docs\\a b.txt", "a b.txt"),
        ("x\x07\u202ey.txt", "xy.txt"),
        ("..", "file"),
        ("n" * 300 + ".txt", "n" * 251 + ".txt"),
        ("Übersicht.md", "Übersicht.md"),
    ],
)
async def test_a_filename_is_made_harmless(client, name, kept):
    from app.schemas.files import clean_filename

    assert clean_filename(name) == kept
    file = await upload(client, name="Übersicht.md")
    header = (await client.files.with_raw_response.content(file.id)).headers["content-disposition"]
    assert header == "attachment; filename*=UTF-8''%C3%9Cbersicht.md"


VS = "/v1/vector_stores"


@pytest.mark.parametrize(
    ("path", "body", "param", "says"),
    [
        (VS, {"nme": "x"}, "nme", "allowed: "),
        (VS, {"metadata": {str(n): "v" for n in range(17)}}, "metadata", "at most 16"),
        (
            VS,
            {"expires_after": {"anchor": "created_at", "days": 1}},
            "expires_after.anchor",
            "last_active_at",
        ),
        (VS, {"chunking_strategy": {"type": "static"}}, "chunking_strategy.static", "static"),
        (
            VS,
            {
                "chunking_strategy": {
                    "type": "static",
                    "static": {"max_chunk_size_tokens": 50, "chunk_overlap_tokens": 0},
                },
            },
            "chunking_strategy.static.max_chunk_size_tokens",
            "between 100 and 4096",
        ),
        (VS + "/{id}/search", {}, "query", "required"),
        (VS + "/{id}/search", {"query": ""}, "query", ""),
        (VS + "/{id}/search", {"query": "x", "max_num_results": 51}, "max_num_results", "50"),
        (VS + "/{id}/search", {"query": "x", "rewrite_query": True}, "rewrite_query", "not supported"),
        (VS + "/{id}/search", {"query": "x", "filters": {"type": "like"}}, "filters.type", "eq"),
        (
            VS + "/{id}/search",
            {"query": "x", "ranking_options": {"hybrid_search": {}}},
            "ranking_options.hybrid_search",
            "ranker",
        ),
        (VS + "/{id}/files", {}, "file_id", "required"),
        (VS + "/{id}/files", {"file_id": "{file}", "attributes": {"k": [1]}}, None, ""),
        (VS + "/{id}/files", {"file_id": "{file}", "attributes": {"k": "v" * 513}}, "attributes.k", "512"),
        (VS + "/{id}/file_batches", {}, "file_ids", "one of both"),
        (VS + "/{id}/file_batches", {"file_ids": []}, "file_ids", ""),
    ],
)
async def test_a_bad_body_is_refused_by_the_field(http, client, path, body, param, says):  # noqa: PLR0917  parameters
    store, file = await client.vector_stores.create(), await upload(client)
    body = json.loads(json.dumps(body).replace("{file}", file.id))
    error = await refused(http, "POST", path.replace("{id}", store.id), 400, json=body)
    assert says in error["message"], error
    assert param is None or error["param"] == param


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "order=up", "after=none", "filter=odd"])
async def test_a_bad_page_is_refused(http, client, query):
    store = await client.vector_stores.create()
    await refused(http, "GET", f"{VS}/{store.id}/files?{query}", 400)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/v1/files/file-none", None),
        ("GET", "/v1/files/file-none/content", None),
        ("DELETE", "/v1/files/file-none", None),
        ("GET", "/v1/vector_stores/vs_none", None),
        ("POST", "/v1/vector_stores/vs_none", {"name": "x"}),
        ("DELETE", "/v1/vector_stores/vs_none", None),
        ("POST", "/v1/vector_stores/vs_none/search", {"query": "x"}),
        ("GET", "/v1/vector_stores/vs_none/files", None),
        ("POST", "/v1/vector_stores/vs_none/files", {"file_id": "{file}"}),
        ("POST", "/v1/vector_stores/{id}/files", {"file_id": "file-none"}),
        ("POST", "/v1/vector_stores", {"file_ids": ["file-none"]}),
        ("GET", "/v1/vector_stores/{id}/files/{file}", None),
        ("GET", "/v1/vector_stores/{id}/files/{file}/content", None),
        ("POST", "/v1/vector_stores/{id}/files/{file}", {"attributes": {}}),
        ("DELETE", "/v1/vector_stores/{id}/files/{file}", None),
        ("GET", "/v1/vector_stores/{id}/file_batches/vsfb_none", None),
        ("POST", "/v1/vector_stores/{id}/file_batches/vsfb_none/cancel", None),
        ("GET", "/v1/vector_stores/{id}/file_batches/vsfb_none/files", None),
    ],
)
async def test_what_does_not_exist_is_404(http, client, method, path, body):
    store, file = await client.vector_stores.create(), await upload(client)
    put = lambda text: text.replace("{id}", store.id).replace("{file}", file.id)  # noqa: E731  once
    more = {"json": json.loads(put(json.dumps(body)))} if body is not None else {}
    error = await refused(http, method, put(path), 404, **more)
    assert error["type"] == "invalid_request_error"
    assert len((await http.get(VS)).json()["data"]) == 1, "a refused creation leaves no store"


async def test_everything_of_another_tenant_is_404(http, client, gateway):
    store = await client.vector_stores.create()
    file = await client.vector_stores.files.upload_and_poll(vector_store_id=store.id, file=("a.txt", WHALES))
    batch = await client.vector_stores.file_batches.create(store.id, file_ids=[file.id])
    gateway.principal = Principal(tenant="eve")
    mine = await client.vector_stores.create()
    base = f"{VS}/{store.id}"
    for method, path, body in (
        ("GET", f"/v1/files/{file.id}", None),
        ("GET", f"/v1/files/{file.id}/content", None),
        ("DELETE", f"/v1/files/{file.id}", None),
        ("GET", base, None),
        ("POST", base, {"name": "x"}),
        ("DELETE", base, None),
        ("POST", f"{base}/search", {"query": "x"}),
        ("GET", f"{base}/files", None),
        ("GET", f"{base}/files/{file.id}", None),
        ("GET", f"{base}/files/{file.id}/content", None),
        ("POST", f"{base}/files/{file.id}", {"attributes": {}}),
        ("DELETE", f"{base}/files/{file.id}", None),
        ("POST", f"{VS}/{mine.id}/files", {"file_id": file.id}),
        ("GET", f"{base}/file_batches/{batch.id}", None),
        ("POST", f"{base}/file_batches/{batch.id}/cancel", None),
        ("GET", f"{base}/file_batches/{batch.id}/files", None),
    ):
        await refused(http, method, path, 404, **({"json": body} if body is not None else {}))
    assert [one async for one in client.files.list()] == []


async def test_a_key_without_the_scope_is_403_and_its_upload_is_not_read(http, gateway):
    gateway.principal = Principal(tenant="t1", scopes=("inference",))
    parts = {"files": {"file": ("a.txt", b"x")}, "data": {"purpose": "assistants"}}
    assert "documents" in (await refused(http, "POST", "/v1/files", 403, **parts))["message"]
    await refused(http, "GET", VS, 403)


async def test_content_before_the_file_is_processed_is_409(http, client, services):
    store, file = await client.vector_stores.create(), await upload(client, b"\x00\x01", "a.txt")
    await client.vector_stores.files.create_and_poll(file.id, vector_store_id=store.id)
    error = await refused(http, "GET", f"{VS}/{store.id}/files/{file.id}/content", 409)
    assert "failed" in error["message"]


async def test_an_expired_store_says_so_and_takes_no_files(http, client, services):
    store = await client.vector_stores.create(expires_after={"anchor": "last_active_at", "days": 1})
    file = await upload(client)
    key = f"shoal:{{t1}}:vs:{store.id}"
    await services.catalog._redis.hset(key, "last_active_at", store.last_active_at - 90_000)
    assert (await client.vector_stores.retrieve(store.id)).status == "expired"
    assert (
        "expired"
        in (await refused(http, "POST", f"{VS}/{store.id}/files", 400, json={"file_id": file.id}))["message"]
    )
