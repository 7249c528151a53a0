"""`/v1/files`: upload, list, retrieve, download, delete.

An upload goes from the socket through a temporary file, which the multipart parser needs, into the document
store; it is never in memory as a whole. How large it may be is the middleware's to say, while it counts.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from urllib.parse import quote

from fastapi import APIRouter, Request
from starlette.datastructures import FormData, UploadFile
from starlette.responses import Response, StreamingResponse

from actors.errors import InvalidRequest, StorageFull
from actors.stores.catalog_records import FileRecord, Purpose
from app.api.deps_documents import Documents, DocumentsCall, FilesCursor
from app.api.errors import JsonResponse
from app.schemas.files import clean_filename, deleted_object, file_object, list_object, purpose_of

router = APIRouter(tags=["Files"])

_BLOCK_BYTES = 1 << 20
_MAX_FIELDS = 16
_FIELD_BYTES = 4096


@router.post("/v1/files")
async def create_file(request: Request, call: Documents) -> Response:
    """Upload one file as multipart/form-data with the parts `file` and `purpose`."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "multipart/form-data":
        raise InvalidRequest(
            "Content-Type must be multipart/form-data with the parts 'file' and 'purpose'", "Content-Type"
        )
    try:
        async with request.form(
            max_files=1, max_fields=_MAX_FIELDS, max_part_size=_FIELD_BYTES
        ) as form:  # an error in it is the caller's: Starlette says 400
            return JsonResponse(file_object(await _store(form, call)))
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise StorageFull("no room for an upload right now", retry_after_s=5.0) from None
        raise


async def _store(form: FormData, call: DocumentsCall) -> FileRecord:
    purpose = purpose_of(form.get("purpose"))
    upload = form.get("file")
    if not isinstance(upload, UploadFile):
        raise InvalidRequest("the part 'file' must be a file with a name", "file")
    unknown = next((name for name in form if name not in {"file", "purpose"}), None)
    if unknown is not None:
        raise InvalidRequest(f"'{unknown[:64]}' is not supported; allowed: file, purpose", unknown[:64])
    if not upload.size:
        raise InvalidRequest("the file is empty", "file")
    file_id = call.catalog.files.new_id()
    stored = await call.services.documents.put_source(call.tenant, file_id, _pieces(upload))
    record = FileRecord(
        id=file_id,
        filename=clean_filename(upload.filename),
        bytes=stored.size_bytes,
        purpose=purpose,
        created_at=0,
        sha256=stored.sha256,
    )
    return await call.catalog.files.add(call.tenant, record)


async def _pieces(upload: UploadFile) -> AsyncIterator[bytes]:
    while piece := await upload.read(_BLOCK_BYTES):
        yield piece


@router.get("/v1/files")
async def list_files(call: Documents, cursor: FilesCursor, purpose: str | None = None) -> Response:
    """One page of files, newest first."""
    wanted: Purpose | None = None
    if purpose:
        wanted = "batch_output" if purpose == "batch_output" else purpose_of(purpose)
    page = await call.catalog.files.page(call.tenant, cursor, wanted)
    return JsonResponse(list_object(page, file_object))


@router.get("/v1/files/{file_id}")
async def retrieve_file(file_id: str, call: Documents) -> Response:
    """One file."""
    return JsonResponse(file_object(await call.catalog.files.get(call.tenant, file_id)))


@router.delete("/v1/files/{file_id}")
async def delete_file(file_id: str, call: Documents) -> Response:
    """Remove a file, also from every vector store."""
    await call.catalog.delete_file(call.tenant, file_id, call.services.jobs)
    return JsonResponse(deleted_object("file", file_id))


@router.get("/v1/files/{file_id}/content")
async def file_content(file_id: str, call: Documents) -> Response:
    """The bytes as they were uploaded."""
    file = await call.catalog.files.get(call.tenant, file_id)
    pieces = call.services.documents.read_source(call.tenant, file_id)
    first = await anext(pieces)  # before the headers go out: what is missing is a 404
    headers = {
        "content-length": str(file.bytes),
        "content-disposition": f"attachment; filename*=UTF-8''{quote(file.filename)}",
        "x-content-type-options": "nosniff",
    }
    return StreamingResponse(_joined(first, pieces), media_type="application/octet-stream", headers=headers)


async def _joined(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in rest:
        yield piece
