"""`/v1/vector_stores` and `/search`; their files and batches are `app.api.vector_store_files`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence

from fastapi import APIRouter, Request
from starlette.responses import Response

from actors.stores.catalog_records import Attachment, StoreFileRecord
from actors.types import Passage, RetrievalResult
from app.api.deps import body_of, read_json
from app.api.deps_documents import Cursor, Documents, DocumentsCall
from app.api.errors import JsonResponse
from app.schemas.files import deleted_object, list_object
from app.schemas.vector_stores import (
    CreateVectorStore,
    SearchRequest,
    UpdateVectorStore,
    search_object,
    store_object,
)

router = APIRouter(tags=["Vector stores"])


@router.post("/v1/vector_stores", openapi_extra=body_of(CreateVectorStore))
async def create_vector_store(request: Request, call: Documents) -> Response:
    """A new vector store, with files to begin with."""
    body = await read_json(request, CreateVectorStore)
    wanted = body.to_attachments()
    await call.catalog.files.get_all(call.tenant, [one.file_id for one in wanted])  # before anything is made
    store = await call.catalog.stores.create(call.tenant, body.to_settings())
    if wanted:
        await attach(call, store.id, wanted)
        store = await call.catalog.stores.get(call.tenant, store.id)
    return JsonResponse(store_object(store))


@router.get("/v1/vector_stores")
async def list_vector_stores(call: Documents, cursor: Cursor) -> Response:
    """One page of vector stores, newest first."""
    return JsonResponse(list_object(await call.catalog.stores.page(call.tenant, cursor), store_object))


@router.get("/v1/vector_stores/{vector_store_id}")
async def retrieve_vector_store(vector_store_id: str, call: Documents) -> Response:
    """One vector store."""
    return JsonResponse(store_object(await call.catalog.stores.get(call.tenant, vector_store_id)))


@router.post("/v1/vector_stores/{vector_store_id}", openapi_extra=body_of(UpdateVectorStore))
async def update_vector_store(vector_store_id: str, request: Request, call: Documents) -> Response:
    """Change name, metadata or expiry."""
    changes = (await read_json(request, UpdateVectorStore)).to_changes()
    return JsonResponse(store_object(await call.catalog.stores.update(call.tenant, vector_store_id, changes)))


@router.delete("/v1/vector_stores/{vector_store_id}")
async def delete_vector_store(vector_store_id: str, call: Documents) -> Response:
    """Remove a vector store; its files stay."""
    await call.catalog.delete_store(call.tenant, vector_store_id, call.services.jobs)
    return JsonResponse(deleted_object("vector_store.deleted", vector_store_id))


@router.post("/v1/vector_stores/{vector_store_id}/search", openapi_extra=body_of(SearchRequest))
async def search_vector_store(vector_store_id: str, request: Request, call: Documents) -> Response:
    """Passages that answer one or several queries."""
    body = await read_json(request, SearchRequest)
    await call.catalog.stores.get(call.tenant, vector_store_id)
    principal = call.session.caller.principal
    queries = body.to_queries(call.tenant, vector_store_id)
    clock = call.session.context.clock
    clock.enter("retrieve")
    # They run side by side: the first one's stages stand for all.
    searches = [
        call.services.search(principal, query, clock if number == 0 else None)
        for number, query in enumerate(queries)
    ]
    results = await call.session.context.guard(_gathered(searches))
    clock.enter("other")
    degraded = ", ".join(dict.fromkeys(result.degraded for result in results if result.degraded))
    headers = {"x-shoal-degraded": degraded} if degraded else {}
    return JsonResponse(search_object(body.query, _merged(results, body.limit)), headers=headers)


async def _gathered(searches: Sequence[Awaitable[RetrievalResult]]) -> list[RetrievalResult]:
    return await asyncio.gather(*searches)


def _merged(results: Sequence[RetrievalResult], limit: int) -> list[Passage]:
    """Best first; a passage that several queries find counts once, with its best score."""
    best: dict[str, Passage] = {}
    for passage in (passage for result in results for passage in result.passages):
        known = best.get(passage.chunk_id)
        if known is None or passage.score > known.score:
            best[passage.chunk_id] = passage
    return sorted(best.values(), key=lambda passage: -passage.score)[:limit]


async def attach(
    call: DocumentsCall, vector_store_id: str, wanted: Sequence[Attachment]
) -> list[StoreFileRecord]:
    """Attach the caller's files to one of its stores.

    Raises:
        NotFound: the store or one of the files does not exist.
        InvalidRequest: the store has expired, or attributes are out of bounds.
    """
    await call.catalog.generation(call.tenant, vector_store_id)
    files = await call.catalog.files.get_all(call.tenant, [one.file_id for one in wanted])
    pairs = list(zip(files, wanted, strict=True))
    return await call.catalog.store_files.attach(call.tenant, vector_store_id, pairs, call.services.jobs)
