"""What a search asks, and how it is bounded: the parts, the config, one search's state.

Shared by `actors.retrieval` and `actors.candidates`; `actors.retriever` makes the parts.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from pydantic import BaseModel, ConfigDict, Field

from actors.guard import LeftOut
from actors.index.bm25 import Bm25Index, FileKey
from actors.index.protocol import IndexHit, Matrix, VectorIndex
from actors.stores.published import CatalogReader, PublishedView
from actors.types import Chunk, RetrievalQuery


class RetrievalConfig(BaseModel):
    """How searches run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    deadline_s: float = Field(
        default=1.5, gt=0, description="For a whole search, unless the caller has less."
    )
    embed_share: float = Field(
        default=0.6, gt=0, lt=1, description="Of the deadline, at most, for embedding the question."
    )
    candidates: int = Field(default=50, ge=1, le=1000, description="Passages that each index proposes.")
    filtered_candidates: int = Field(
        default=400, ge=1, le=5000, description="The same from the vector index when a filter is to follow."
    )
    dense_weight: float = Field(default=1.0, gt=0, description="Weight of the vector index in the fusion.")
    bm25_weight: float = Field(default=1.0, gt=0, description="Weight of BM25 in the fusion.")
    max_bm25_bytes: int = Field(
        default=512 * 1024**2, gt=0, description="Memory for BM25 indexes of the stores searched last."
    )
    failures_to_open: int = Field(
        default=5, ge=1, description="Failures in a row after which a part is not asked for a while."
    )
    open_s: float = Field(default=1.0, gt=0, description="That while; doubles up to max_open_s.")
    max_open_s: float = Field(default=15.0, gt=0, description="The longest while.")


class Document(Protocol):
    """The part of a document version that is needed here."""

    @property
    def filename(self) -> str:
        """Name of the file."""

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """Its chunks."""


class DocumentReader(Protocol):
    """The part of `actors.stores.documents.DocumentStore` that is needed here."""

    async def get_version(self, tenant: str, vector_store_id: str, file_id: str, version: str) -> Document:
        """One document version."""


EmbedQuery = Callable[[str, float], Awaitable[Matrix]]
"""A question and a time-out in seconds to its embedding, one row of length 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalParts:
    """What a search asks."""

    embed: EmbedQuery
    index: VectorIndex
    catalog: CatalogReader
    documents: DocumentReader


@dataclass(frozen=True, slots=True)
class Scope:
    """One vector store, and what of it the query's filter lets through."""

    view: PublishedView
    versions: Collection[FileKey]

    def holds(self, hit: IndexHit, bm25: Bm25Index | None) -> bool:
        """Is a hit of the vector index published and let through?

        Entries of a replaced version are in the index for a while; BM25, if it knows the published one, tells.
        """
        record = self.view.files.get(hit.entry.file_id)
        if record is None or (key := (record.file_id, record.version)) not in self.versions:
            return False
        return bm25 is None or key not in bm25.files or bm25.key_of(hit.entry.chunk_id) == key


@dataclass(frozen=True, slots=True)
class Found:
    """A hit and the store that it is from."""

    scope: Scope
    hit: IndexHit


class Search:
    """One search: its clock, and what is known so far."""

    def __init__(self, query: RetrievalQuery, timeout_s: float) -> None:
        self.query = query
        self.timeout_s = timeout_s
        self._started = time.monotonic()
        self.embed_s = 0.0
        self.left_out: list[LeftOut] = []
        self.bm25: dict[str, Bm25Index] = {}  # by vector store

    def elapsed_s(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._started

    def left_s(self) -> float:
        """Seconds to its deadline; never quite 0, so that a time-out made of it is one."""
        return max(self.timeout_s - self.elapsed_s(), 0.001)
