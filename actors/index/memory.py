"""A vector index in this process: exact search over numpy rows.

Nothing is kept when the process ends and no other actor sees it, so it is for tests and for benchmarks that
need the exact answer; it is held to the same contract suite as `actors.index.chroma`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from actors.errors import Conflict
from actors.index.protocol import IndexEntry, IndexHit, Matrix

_SAME = 1e-4  # of a cosine: two vectors this near are one for `missing`


@dataclass(frozen=True, slots=True)
class _Row:
    entry: IndexEntry
    vector: npt.NDArray[np.float32]

    def score(self, vector: npt.NDArray[np.float32]) -> float:
        return float(self.vector @ vector)


class MemoryIndex:
    """See `actors.index.protocol.VectorIndex`, which it implements."""

    def __init__(self) -> None:
        self._collections: dict[str, dict[str, _Row]] = {}

    async def upsert(self, collection: str, entries: Sequence[IndexEntry], embeddings: Matrix) -> None:
        """Write entries, replacing those with the same id."""
        rows = self._collections.setdefault(collection, {})
        known = next(iter(rows.values()), None)
        if known is not None and len(known.vector) != embeddings.shape[1]:
            raise Conflict(f"the collection holds vectors of {len(known.vector)} dimensions")
        for entry, vector in zip(entries, embeddings, strict=True):
            rows[entry.chunk_id] = _Row(entry, np.array(vector, dtype=np.float32))

    async def query(self, collection: str, embedding: Matrix, k: int) -> list[IndexHit]:
        """The exact nearest entries; equal scores in the order of their ids."""
        rows = self._collections.get(collection, {}).values()
        hits = [IndexHit(entry=row.entry, score=row.score(embedding[0])) for row in rows]
        return sorted(hits, key=lambda hit: (-hit.score, hit.entry.chunk_id))[:k]

    async def delete_files(self, collection: str, file_ids: Sequence[str]) -> None:
        """Remove every entry of these files."""
        self._keep(collection, lambda entry: entry.file_id not in file_ids)

    async def delete_entries(self, collection: str, chunk_ids: Sequence[str]) -> None:
        """Remove these entries; unknown ids are ignored."""
        self._keep(collection, lambda entry: entry.chunk_id not in chunk_ids)

    async def missing(self, collection: str, chunk_ids: Sequence[str], embeddings: Matrix) -> list[str]:
        """Which of these entries are not there, or with another vector."""
        rows = self._collections.get(collection, {})
        return [
            one
            for one, vector in zip(chunk_ids, embeddings, strict=True)
            if one not in rows or rows[one].score(vector) < 1 - _SAME
        ]

    async def drop(self, collection: str) -> None:
        """Delete a collection; a missing one is ignored."""
        self._collections.pop(collection, None)

    async def check_health(self) -> None:
        """Always well."""

    async def close(self) -> None:
        """Nothing to let go of."""

    def _keep(self, collection: str, wanted: Callable[[IndexEntry], bool]) -> None:
        rows = self._collections.get(collection, {})
        for chunk_id in [one for one, row in rows.items() if not wanted(row.entry)]:
            del rows[chunk_id]
