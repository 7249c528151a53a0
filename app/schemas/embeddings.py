"""The embeddings request and its answer. `app.api.embeddings` calls it."""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from pydantic import Field, PlainValidator

from actors.types import Embeddings
from app.schemas.bad_input import wrong
from app.schemas.common import Inputs, ModelName, WireModel, text_inputs

MAX_INPUTS = 2048


def _inputs(value: Any) -> Inputs:
    texts = text_inputs(value)
    if len(texts) > MAX_INPUTS:
        raise wrong(f"{len(texts)} inputs, at most {MAX_INPUTS} allowed")
    return texts


class EmbeddingsRequest(WireModel):
    """The body of `POST /v1/embeddings`."""

    model: ModelName
    input: Annotated[
        Inputs,
        PlainValidator(_inputs, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
    ]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None
    ignored: ClassVar[frozenset[str]] = frozenset({"safety_identifier"})


def embedding_rows(found: Embeddings, encoding: Literal["float", "base64"]) -> Iterator[bytes]:
    """Each vector as one JSON object of the answer's `data`, encoded.

    Args:
        found: float32 rows, little-endian.
        encoding: numbers, or base64 of the row's bytes.
    """
    width = found.dimensions * 4
    for index, start in enumerate(range(0, len(found.vectors), width)):
        row = found.vectors[start : start + width]
        value: Any = base64.b64encode(row).decode() if encoding == "base64" else _floats(row)
        yield msgspec.json.encode({"object": "embedding", "index": index, "embedding": value})


def _floats(row: bytes) -> tuple[float, ...]:
    return struct.unpack(f"<{len(row) // 4}f", row)
