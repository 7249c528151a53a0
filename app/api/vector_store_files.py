"""`/v1/vector_stores/{id}/files` and `/file_batches`."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from actors.errors import Conflict
from actors.stores.catalog_records import FileBatchRecord, FileStatus, StoreFileRecord
from app.api.deps import body_of, read_json
from app.api.deps_documents import Cursor, Documents
from app.api.errors import JsonResponse
from app.api.vector_stores import attach
from app.schemas.files import deleted_object, list_object
from app.schemas.vector_stores import (
    AttachFile,
    CreateFileBatch,
    UpdateFile,
    batch_object,
    content_object,
    store_file_object,
)

router = APIRouter(tags=["Vector stores"])

# The official clients ask again after this while something is in progress; their own default is a second.
_POLL_AFTER = {"openai-poll-after-ms": "250"}

StatusFilter = Annotated[
    Literal["in_progress", "completed", "failed", "cancelled"] | None, Query(alias="filter")
]


# --- files -------------------------------------------------------------------------------------------


@router.post("/v1/vector_stores/{vector_store_id}/files", openapi_extra=body_of(AttachFile))
async def create_store_file(vector_store_id: str, request: Request, call: Documents) -> Response:
    """Attach a file; it is ingested in the background."""
    body = await read_json(request, AttachFile)
    [record] = await attach(call, vector_store_id, [body.to_attachment()])
    return _file(record)


@router.get("/v1/vector_stores/{vector_store_id}/files")
async def list_store_files(
    vector_store_id: str, call: Documents, cursor: Cursor, status: StatusFilter = None
) -> Response:
    """One page of a store's files, newest first."""
    await call.catalog.stores.get(call.tenant, vector_store_id)
    page = await call.catalog.store_files.page(call.tenant, vector_store_id, cursor, status)
    return JsonResponse(list_object(page, store_file_object))


@router.get("/v1/vector_stores/{vector_store_id}/files/{file_id}")
async def retrieve_store_file(vector_store_id: str, file_id: str, call: Documents) -> Response:
    """One file of a store."""
    await call.catalog.stores.get(call.tenant, vector_store_id)
    return _file(await call.catalog.store_files.get(call.tenant, vector_store_id, file_id))


@router.post("/v1/vector_stores/{vector_store_id}/files/{file_id}", openapi_extra=body_of(UpdateFile))
async def update_store_file(
    vector_store_id: str, file_id: str, request: Request, call: Documents
) -> Response:
    """Replace a file's attributes."""
    body = await read_json(request, UpdateFile)
    record = await call.catalog.store_files.set_attributes(
        call.tenant, vector_store_id, file_id, body.attributes or {}, call.services.jobs
    )
    return _file(record)


@router.delete("/v1/vector_stores/{vector_store_id}/files/{file_id}")
async def delete_store_file(vector_store_id: str, file_id: str, call: Documents) -> Response:
    """Take a file out of the store; the file itself stays."""
    await call.catalog.store_files.remove(call.tenant, vector_store_id, file_id, call.services.jobs)
    return JsonResponse(deleted_object("vector_store.file.deleted", file_id))


@router.get("/v1/vector_stores/{vector_store_id}/files/{file_id}/content")
async def store_file_content(vector_store_id: str, file_id: str, call: Documents) -> Response:
    """The text that the file was parsed to."""
    await call.catalog.stores.get(call.tenant, vector_store_id)
    record = await call.catalog.store_files.get(call.tenant, vector_store_id, file_id)
    if not record.version:
        raise Conflict(f"the file is not processed: its status is {record.status}", "file_id")
    version = await call.services.documents.get_version(call.tenant, vector_store_id, file_id, record.version)
    return JsonResponse(content_object(version.text))


# --- batches -----------------------------------------------------------------------------------------


@router.post("/v1/vector_stores/{vector_store_id}/file_batches", openapi_extra=body_of(CreateFileBatch))
async def create_file_batch(vector_store_id: str, request: Request, call: Documents) -> Response:
    """Attach several files at once."""
    body = await read_json(request, CreateFileBatch)
    # Files first: attaching again changes nothing, while a batch of files that are not there would hang.
    records = await attach(call, vector_store_id, body.to_attachments())
    ids = [record.file_id for record in records]
    return _batch(await call.catalog.batches.create(call.tenant, vector_store_id, ids))


@router.get("/v1/vector_stores/{vector_store_id}/file_batches/{batch_id}")
async def retrieve_file_batch(vector_store_id: str, batch_id: str, call: Documents) -> Response:
    """One batch."""
    await call.catalog.stores.get(call.tenant, vector_store_id)
    return _batch(await call.catalog.batches.get(call.tenant, vector_store_id, batch_id))


@router.post("/v1/vector_stores/{vector_store_id}/file_batches/{batch_id}/cancel")
async def cancel_file_batch(vector_store_id: str, batch_id: str, call: Documents) -> Response:
    """Stop what is not done of a batch."""
    await call.catalog.stores.get(call.tenant, vector_store_id)
    return _batch(await call.catalog.batches.cancel(call.tenant, vector_store_id, batch_id))


@router.get("/v1/vector_stores/{vector_store_id}/file_batches/{batch_id}/files")
async def list_batch_files(
    vector_store_id: str, batch_id: str, call: Documents, cursor: Cursor, status: StatusFilter = None
) -> Response:
    """One page of a batch's files."""
    await call.catalog.stores.get(call.tenant, vector_store_id)
    page = await call.catalog.batches.page(call.tenant, vector_store_id, batch_id, cursor, status)
    return JsonResponse(list_object(page, store_file_object))


def _file(record: StoreFileRecord) -> Response:
    return JsonResponse(store_file_object(record), headers=_hint(record.status))


def _batch(batch: FileBatchRecord) -> Response:
    return JsonResponse(batch_object(batch), headers=_hint(batch.status))


def _hint(status: FileStatus) -> dict[str, str]:
    return _POLL_AFTER if status == "in_progress" else {}
