"""`/v1/batches`: files of requests, answered when there is room, with every result in a file."""

from __future__ import annotations

import hashlib
import time
import uuid
from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from actors.errors import InvalidRequest
from actors.stores.batches import Batches
from app.api.deps import InferenceSession, Session, body_of, read_json, services
from app.api.deps_documents import DocumentServices
from app.api.errors import JsonResponse
from app.api.responses import idempotency_key
from app.schemas.batches import BatchRequest, batch_object, head_of

router = APIRouter(tags=["Batches"])


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchesCall:
    """An authenticated call on batches."""

    session: Session
    services: DocumentServices
    batches: Batches

    @property
    def tenant(self) -> str:
        """Whose batches: from the key alone."""
        return self.session.caller.principal.tenant


async def _call(session: InferenceSession, request: Request) -> BatchesCall:
    found = await services(request)
    return BatchesCall(
        session=session, services=cast(DocumentServices, found), batches=cast(Batches, found.batches)
    )


Call = Annotated[BatchesCall, Depends(_call)]


@router.post("/v1/batches", openapi_extra=body_of(BatchRequest))
async def create_batch(request: Request, call: Call) -> Response:
    """Take a batch; its file is looked at by the runner."""
    body = await read_json(request, BatchRequest)
    file = await call.services.catalog.files.get(call.tenant, body.input_file_id)
    if file.purpose != "batch":
        raise InvalidRequest(
            f"the purpose of the input file must be 'batch'; it is '{file.purpose}'", "input_file_id"
        )
    batch_id, created_at = f"batch_{uuid.uuid4().hex}", int(time.time())
    task = await call.session.accept_batch(batch_id, body.endpoint, body.input_file_id)
    mark = hashlib.sha256(await request.body()).hexdigest()
    head = head_of(body, batch_id, created_at)
    known = await call.batches.accept(task, head, created_at, mark, idempotency_key(request))
    return JsonResponse(batch_object(await call.batches.get(call.tenant, known)))


@router.get("/v1/batches")
async def list_batches(
    call: Call, after: str | None = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
) -> Response:
    """One page of batches, newest first."""
    found, more = await call.batches.page(call.tenant, after, limit)
    data = [batch_object(one) for one in found]
    return JsonResponse(
        {
            "object": "list",
            "data": data,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
            "has_more": more,
        }
    )


@router.get("/v1/batches/{batch_id}")
async def retrieve_batch(batch_id: str, call: Call) -> Response:
    """One batch."""
    return JsonResponse(batch_object(await call.batches.get(call.tenant, batch_id)))


@router.post("/v1/batches/{batch_id}/cancel")
async def cancel_batch(batch_id: str, call: Call) -> Response:
    """End a batch with the results that there are."""
    return JsonResponse(batch_object(await call.batches.cancel(call.tenant, batch_id, int(time.time()))))
