"""What the catalog knows: files, vector stores, their files and batches, and pages of them.

Made by `actors.stores.catalog`, read by the HTTP routers, ingestion and the retriever. They are OpenAI's objects
plus what ingestion needs; their wire shapes are `app.schemas`. Times are unix seconds of the Redis server.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from actors.errors import InvalidRequest
from actors.policies.chunking import Chunking

T = TypeVar("T")
FileStatus = Literal["in_progress", "completed", "failed", "cancelled"]
FILE_STATUSES: tuple[FileStatus, ...] = ("in_progress", "completed", "failed", "cancelled")
Purpose = Literal["assistants", "user_data", "batch", "batch_output"]
ErrorCode = Literal["server_error", "unsupported_file", "invalid_file"]
Attributes = Mapping[str, str | float | bool]

_PAIRS = 16
_KEY_CHARS = 64
_VALUE_CHARS = 512
_DAY_S = 86_400


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """An uploaded file; its bytes are in the document store."""

    id: str  # "file-…"
    filename: str
    bytes: int
    purpose: Purpose
    created_at: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class FileCounts:
    """Files of a vector store or batch by status."""

    in_progress: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.in_progress + self.completed + self.failed + self.cancelled


@dataclass(frozen=True, kw_only=True, slots=True)
class VectorStoreRecord:
    """A vector store; `generation` grows with every change of what a search in it can find."""

    id: str  # "vs_…"; also the name of its collection in the index
    name: str
    created_at: int
    last_active_at: int  # of the last search or change of files
    generation: int = 0
    description: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    expires_after_days: int | None = None  # after last_active_at
    expired: bool = False
    usage_bytes: int = 0
    counts: FileCounts = field(default_factory=FileCounts)

    @property
    def expires_at(self) -> int | None:
        """When it expires unless it is used before."""
        days = self.expires_after_days
        return None if days is None else self.last_active_at + days * _DAY_S


@dataclass(frozen=True, kw_only=True, slots=True)
class LastError:
    """Why a file failed; `code` is one of OpenAI's."""

    code: ErrorCode
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreFileRecord:
    """A file in a vector store."""

    file_id: str
    vector_store_id: str
    filename: str
    created_at: int
    revision: str  # of this attachment: ingestion that belongs to an older one may not publish
    status: FileStatus = "in_progress"
    last_error: LastError | None = None
    attributes: Attributes = field(default_factory=dict)
    chunking: Chunking = field(default_factory=Chunking)
    version: str = ""  # the published document version; "" before the first
    usage_bytes: int = 0  # of the published version
    progress: float = 0.0  # share of the chunks that are embedded, 0 to 1


@dataclass(frozen=True, kw_only=True, slots=True)
class FileBatchRecord:
    """Files that were attached together."""

    id: str  # "vsfb_…"
    vector_store_id: str
    created_at: int
    counts: FileCounts = field(default_factory=FileCounts)
    cancelled: bool = False

    @property
    def status(self) -> FileStatus:
        """In progress while any file is; then cancelled if asked, failed if nothing worked, else completed."""
        if self.counts.in_progress:
            return "in_progress"
        if self.cancelled:
            return "cancelled"
        return "failed" if self.counts.total and self.counts.failed == self.counts.total else "completed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Attachment:
    """A file to attach to a vector store, as asked for."""

    file_id: str
    attributes: Attributes = field(default_factory=dict)
    chunking: Chunking = field(default_factory=Chunking)


@dataclass(frozen=True, kw_only=True, slots=True)
class PageQuery:
    """OpenAI's cursor pagination: `after` and `before` are ids.

    Raises:
        InvalidRequest: the limit or order is out of bounds.
    """

    limit: int = 20
    order: Literal["asc", "desc"] = "desc"
    after: str | None = None
    before: str | None = None
    max_limit: int = 100

    def __post_init__(self) -> None:
        """Refuse what is out of bounds."""
        if not 1 <= self.limit <= self.max_limit:
            raise InvalidRequest(f"limit must be between 1 and {self.max_limit}", "limit")
        if self.order not in {"asc", "desc"}:
            raise InvalidRequest("order must be asc or desc", "order")


@dataclass(frozen=True, kw_only=True, slots=True)
class Page(Generic[T]):
    """One page of a listing."""

    items: Sequence[T]
    has_more: bool


def check_metadata(metadata: Mapping[str, object]) -> None:
    """Refuse metadata beyond OpenAI's bounds: 16 pairs of strings, keys ≤ 64, values ≤ 512 characters."""
    _check_pairs(metadata, "metadata", (str,))


def check_attributes(attributes: Mapping[str, object]) -> None:
    """The same for attributes, whose values may also be numbers or booleans."""
    _check_pairs(attributes, "attributes", (str, int, float, bool))


def _check_pairs(pairs: Mapping[str, object], param: str, types: tuple[type, ...]) -> None:
    if len(pairs) > _PAIRS:
        raise InvalidRequest(f"{param} may have at most {_PAIRS} pairs; got {len(pairs)}", param)
    for key, value in pairs.items():
        if not 1 <= len(key) <= _KEY_CHARS:
            raise InvalidRequest(f"keys of {param} must have 1 to {_KEY_CHARS} characters", param)
        if not isinstance(value, types):
            allowed = "strings" if types == (str,) else "strings, numbers or booleans"
            raise InvalidRequest(f"values of {param} must be {allowed}", f"{param}.{key}")
        if isinstance(value, str) and len(value) > _VALUE_CHARS:
            raise InvalidRequest(
                f"values of {param} may have at most {_VALUE_CHARS} characters", f"{param}.{key}"
            )
