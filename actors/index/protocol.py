"""What a vector index can do: the Protocol that ingestion writes through and the retriever reads through.

An index is a projection of the document store: it can be emptied and rebuilt at any time without embedding
again. Implementations: `actors.index.chroma` and the in-memory one that ships for tests; one contract suite
(`tests/contract/test_vector_index_contract.py`) runs over both. Embeddings are always given by the caller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float32]  # (rows, dimensions), rows of length 1


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexEntry:
    """One chunk as the index stores it: enough to build a `Passage` without reading the document."""

    chunk_id: str
    file_id: str
    filename: str
    text: str
    start: int  # character offset in the parsed document
    attributes: Mapping[str, Any] = field(default_factory=dict)  # str | int | float | bool values


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexHit:
    """One search result; `score` is the cosine similarity, the higher the better."""

    entry: IndexEntry
    score: float


class VectorIndex(Protocol):
    """Collections of embedded chunks, one collection per vector store."""

    async def upsert(self, collection: str, entries: Sequence[IndexEntry], embeddings: Matrix) -> None:
        """Write entries, replacing those with the same id; creates the collection if needed.

        Raises:
            Unavailable: the index cannot be reached or its collection is broken.
            StorageFull: it has no room.
        """

    async def query(self, collection: str, embedding: Matrix, k: int) -> list[IndexHit]:
        """The `k` nearest entries to a (1, dimensions) embedding, best first; a missing collection is empty.

        Raises:
            Unavailable: as above.
        """

    async def delete_files(self, collection: str, file_ids: Sequence[str]) -> None:
        """Remove every entry of these files."""

    async def delete_entries(self, collection: str, chunk_ids: Sequence[str]) -> None:
        """Remove these entries; unknown ids are ignored."""

    async def missing(self, collection: str, chunk_ids: Sequence[str], embeddings: Matrix) -> list[str]:
        """Which of these entries do not find themselves when searched by their own embedding."""

    async def drop(self, collection: str) -> None:
        """Delete a collection; a missing one is ignored."""

    async def check_health(self) -> None:
        """Return when the server answers a real query.

        Raises:
            Unavailable: it does not.
        """
