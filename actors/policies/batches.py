"""What a batch is: the task of its job, its states, and what a line of its input file must look like.

Pure. `actors.stores.batches` keeps it, `actors.batcher` runs it; what a line asks for and how its answer looks is
the HTTP layer's (`app.batch_lines`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from actors.policies.limits import UNLIMITED, Limits
from actors.types import Principal

KIND = "batch"  # the job log's name for these jobs
MOST_LINES = 50_000
MOST_LINE_BYTES = 10_000_000  # as much as a request's body may have
WINDOW_S = 86_400

Status = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchTask:
    """A batch as a runner gets it."""

    batch_id: str
    principal: Principal  # in class batch
    endpoint: Endpoint
    input_file_id: str
    cache_salt: str  # of the tenant
    embedding_model: str = ""  # what this system calls it; "": it has none
    aliases: Mapping[str, str] = field(default_factory=dict)  # other names of models, when it was accepted
    limits: Limits = UNLIMITED  # of the key
    tenant_limits: Limits = UNLIMITED


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One request of a batch."""

    custom_id: str
    body: Mapping[str, Any]


class BadLine(Exception):
    """A line that makes the whole batch invalid.

    Args:
        code: of the error, in OpenAI's terms.
        message: what is wrong and what is allowed.
        param: which field.
    """

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.param = code, message, param


class _Wire(msgspec.Struct):
    custom_id: str
    method: str
    url: str
    body: dict[str, Any]


_decode = msgspec.json.Decoder(_Wire).decode


def parse_line(raw: bytes, endpoint: Endpoint) -> Line:
    """One line of an input file.

    Raises:
        BadLine: it is no request for this endpoint.
    """
    try:
        wire = _decode(raw)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise BadLine("invalid_json_line", f"this line is no request: {error}") from None
    if not 0 < len(wire.custom_id) <= 512:
        raise BadLine("invalid_custom_id", "custom_id must have 1 to 512 characters", "custom_id")
    if wire.method != "POST":
        raise BadLine("invalid_method", "method must be POST", "method")
    if wire.url != endpoint:
        raise BadLine("invalid_url", f"url must be the batch's endpoint, {endpoint}", "url")
    return Line(custom_id=wire.custom_id, body=wire.body)
