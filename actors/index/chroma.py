"""Chroma as a vector index: one collection per vector store, cosine space, vectors always given.

Written by ingestion, read by the retriever; both through `actors.index.protocol.VectorIndex`. The server is
`chroma run`, started by `actors.local_services` or outside. Filters are not pushed down and text does not go
into `documents`: the first is a full scan, the second a trigram index that nobody searches (it doubles the
server's CPU per write and the size on disk).
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
import numpy as np

from actors.errors import Unavailable
from actors.index.chroma_http import ChromaHttp, Missing, NotYet
from actors.index.protocol import IndexEntry, IndexHit, Matrix

_MOST_PER_BATCH = 1000  # the server takes 5,461; smaller batches hold it up less for those who search
_PROBE = "shoal-probe"
_TRIES = 5  # of a query that meets the first write of its collection
_FIRST_WRITE_S = 0.1
_SAME = 1e-4  # of a cosine distance: nearer than this, two vectors are one
_NEIGHBOURS = 8  # asked for by `missing`, so that a few equal chunks do not hide each other
T = TypeVar("T")


class ChromaIndex:
    """See `actors.index.protocol.VectorIndex`, which it implements.

    Args:
        url: `http://host:port` of the server.
        read_timeout_s: for one search; the retriever's own deadline is shorter.
        write_timeout_s: for one batch of a write.
    """

    def __init__(self, url: str, *, read_timeout_s: float = 10.0, write_timeout_s: float = 60.0) -> None:
        self._http = ChromaHttp(url)
        self._read_timeout_s = read_timeout_s
        self._write_timeout_s = write_timeout_s
        self._ids: dict[str, str] = {}  # collection name → Chroma's id of it

    async def upsert(self, collection: str, entries: Sequence[IndexEntry], embeddings: Matrix) -> None:
        """Write entries, replacing those with the same id; creates the collection if needed."""
        for part in _slices(len(entries)):
            body = {
                "ids": [entry.chunk_id for entry in entries[part]],
                "embeddings": [_base64(row) for row in embeddings[part]],
                "metadatas": [_metadata(entry) for entry in entries[part]],
            }
            await self._write(collection, "upsert", body, create=True)

    async def query(self, collection: str, embedding: Matrix, k: int) -> list[IndexHit]:
        """The `k` nearest entries, best first; equal scores in the order of their ids."""
        body = {
            "query_embeddings": embedding.tolist(),
            "n_results": k,
            "include": ["metadatas", "distances"],
        }
        found = await self._read(collection, "query", body)
        if found is None:
            return []
        rows = zip(found["ids"][0], found["metadatas"][0], found["distances"][0], strict=True)
        hits = [IndexHit(entry=_entry(one, data), score=1.0 - distance) for one, data, distance in rows]
        return sorted(hits, key=lambda hit: (-hit.score, hit.entry.chunk_id))

    async def delete_files(self, collection: str, file_ids: Sequence[str]) -> None:
        """Remove every entry of these files."""
        for part in _slices(len(file_ids)):
            where = {"file_id": {"$in": list(file_ids[part])}}
            await self._write(collection, "delete", {"where": where})

    async def delete_entries(self, collection: str, chunk_ids: Sequence[str]) -> None:
        """Remove these entries; unknown ids are ignored."""
        for part in _slices(len(chunk_ids)):
            await self._write(collection, "delete", {"ids": list(chunk_ids[part])})

    async def missing(self, collection: str, chunk_ids: Sequence[str], embeddings: Matrix) -> list[str]:
        """Which of these entries do not find themselves when searched by their own embedding."""
        if not chunk_ids:
            return []
        body = {
            "query_embeddings": embeddings.tolist(),
            "n_results": _NEIGHBOURS,
            "include": ["distances"],
        }
        found = await self._read(collection, "query", body)
        if found is None:
            return list(chunk_ids)
        rows = list(zip(chunk_ids, found["ids"], found["distances"], strict=True))
        hidden = [one for one, ids, distances in rows if one not in ids and _all_same(distances)]
        stored = await self._stored(collection, hidden)
        return [one for one, ids, _ in rows if one not in ids and one not in stored]

    async def drop(self, collection: str) -> None:
        """Delete a collection; a missing one is ignored."""
        self._ids.pop(collection, None)
        try:
            await self._request("DELETE", f"/collections/{collection}", None, self._write_timeout_s)
        except Missing:
            return

    async def check_health(self) -> None:
        """Write a vector and find it: an answer to a ping says nothing about the data."""
        entry = IndexEntry(chunk_id="probe", file_id="probe", filename="", text="", start=0)
        vector = np.array([[1.0, 0.0]], dtype=np.float32)
        await self.upsert(_PROBE, [entry], vector)
        if not await self.query(_PROBE, vector, 1):
            raise Unavailable("the vector index does not find what was written to it", retry_after_s=1)

    async def close(self) -> None:
        """Close the connections to the server."""
        await self._http.close()

    async def _stored(self, collection: str, chunk_ids: Sequence[str]) -> set[str]:
        if not chunk_ids:
            return set()
        found = await self._read(collection, "get", {"ids": list(chunk_ids), "include": []})
        return set(found["ids"]) if found else set()

    # --- one request ---------------------------------------------------------------------------------

    async def _write(self, collection: str, verb: str, body: Any, *, create: bool = False) -> None:
        def send(one: str) -> Awaitable[Any]:
            return self._request("POST", f"/collections/{one}/{verb}", body, self._write_timeout_s)

        try:
            await self._with_id(collection, send, create=create)
        except NotYet:
            raise Unavailable("the vector index is still writing", retry_after_s=1) from None

    async def _read(self, collection: str, verb: str, body: Any) -> dict[str, Any] | None:
        def send(one: str) -> Awaitable[Any]:
            return self._request("POST", f"/collections/{one}/{verb}", body, self._read_timeout_s)

        for _ in range(_TRIES):
            try:
                return await self._with_id(collection, send, create=False)
            except NotYet:
                await asyncio.sleep(_FIRST_WRITE_S)
        raise Unavailable("the vector index is still writing", retry_after_s=1)

    async def _with_id(
        self, collection: str, send: Callable[[str], Awaitable[T]], *, create: bool
    ) -> T | None:
        """Call with the collection's id; None when it is missing. A remembered id may be out of date."""
        known = self._ids.get(collection)
        if known is not None:
            try:
                return await send(known)
            except Missing:
                del self._ids[collection]
        try:
            self._ids[collection] = fresh = await self._look_up(collection, create=create)
            return await send(fresh)
        except Missing:
            self._ids.pop(collection, None)
            return None

    async def _look_up(self, collection: str, *, create: bool) -> str:
        if create:
            body = {
                "name": collection,
                "get_or_create": True,
                "configuration": {"hnsw": {"space": "cosine"}},
            }
            found = await self._request("POST", "/collections", body, self._write_timeout_s)
        else:
            found = await self._request("GET", f"/collections/{collection}", None, self._read_timeout_s)
        return str(found["id"])

    async def _request(self, method: str, path: str, body: Any, timeout_s: float) -> Any:
        return await self._http.request(method, path, body, timeout_s=timeout_s)


def _slices(count: int) -> Iterator[slice]:
    return (slice(at, at + _MOST_PER_BATCH) for at in range(0, count, _MOST_PER_BATCH))


def _base64(row: Any) -> str:
    return base64.b64encode(np.asarray(row, dtype="<f4").tobytes()).decode()


def _all_same(distances: Sequence[float]) -> bool:
    return len(distances) == _NEIGHBOURS and max(distances) < _SAME


def _metadata(entry: IndexEntry) -> dict[str, str | int]:
    data: dict[str, str | int] = {
        "file_id": entry.file_id,
        "filename": entry.filename,
        "text": entry.text,
        "start": entry.start,
    }
    if entry.attributes:
        data["attributes"] = msgspec.json.encode(entry.attributes).decode()
    return data


def _entry(chunk_id: str, data: Mapping[str, Any]) -> IndexEntry:
    return IndexEntry(
        chunk_id=chunk_id,
        file_id=data["file_id"],
        filename=data["filename"],
        text=data["text"],
        start=data["start"],
        attributes=msgspec.json.decode(data.get("attributes", "{}")),
    )
