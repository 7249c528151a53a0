"""The batch request, and OpenAI's batch object. `app.api.batches` calls it."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from pydantic import Field

from actors.policies.batches import WINDOW_S, Endpoint
from actors.stores.batches import TIMES, BatchRecord
from app.schemas.common import WireModel
from app.schemas.generation import Metadata


class BatchRequest(WireModel):
    """The body of `POST /v1/batches`."""

    input_file_id: Annotated[str, Field(min_length=1, max_length=128)]
    endpoint: Endpoint
    completion_window: Literal["24h"]
    metadata: Metadata | None = None
    ignored: ClassVar[frozenset[str]] = frozenset()


def head_of(body: BatchRequest, batch_id: str, created_at: int) -> bytes:
    """What of a batch object never changes, as JSON."""
    return msgspec.json.encode(
        {
            "id": batch_id,
            "object": "batch",
            "endpoint": body.endpoint,
            "input_file_id": body.input_file_id,
            "completion_window": body.completion_window,
            "created_at": created_at,
            "expires_at": created_at + WINDOW_S,
            "metadata": body.metadata or {},
        }
    )


def batch_object(batch: BatchRecord) -> dict[str, Any]:
    """OpenAI's `batch`."""
    return {
        **msgspec.json.decode(batch.head),
        "status": batch.status,
        "errors": msgspec.json.decode(batch.errors),
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "request_counts": {"total": batch.total, "completed": batch.completed, "failed": batch.failed},
        **{name: batch.times.get(name) for name in TIMES},
    }
