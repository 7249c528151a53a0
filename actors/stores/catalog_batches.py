"""File batches: files that were attached to a vector store together.

Reached as `Catalog.batches`. Keys, under `shoal:{tenant}:vs:<store>:`

    batch:<batch>   hash: record (JSON: ids and time), cancelled (1 once asked for)
    batches         set of batch ids, for the store's removal
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from redis.asyncio import Redis

from actors.errors import InvalidRequest, NotFound
from actors.stores.catalog_keys import StoreKeys, new_id
from actors.stores.catalog_records import (
    FileBatchRecord,
    FileCounts,
    FileStatus,
    Page,
    PageQuery,
    StoreFileRecord,
)
from actors.stores.catalog_store_files import StoreFiles
from actors.stores.redis import translated


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stored:
    id: str
    created_at: int
    file_ids: tuple[str, ...]


class FileBatches:
    """Records of file batches.

    Args:
        redis: the client; replies are bytes.
        store_files: the files they are made of.
    """

    def __init__(self, redis: Redis, store_files: StoreFiles) -> None:
        self._redis: Any = redis  # replies are bytes; the client's types allow more
        self._store_files = store_files

    @translated("the catalog")
    async def create(self, tenant: str, store_id: str, file_ids: Sequence[str]) -> FileBatchRecord:
        """Note that these files belong together; attaching them is the caller's."""
        keys = StoreKeys(tenant, store_id)
        now, _ = await self._redis.time()
        stored = _Stored(id=new_id("vsfb_"), created_at=now, file_ids=tuple(dict.fromkeys(file_ids)))
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hset(keys.part("batch", stored.id), "record", msgspec.json.encode(stored))
            pipe.sadd(keys.part("batches"), stored.id)
            await pipe.execute()
        return await self.get(tenant, store_id, stored.id)

    async def get(self, tenant: str, store_id: str, batch_id: str) -> FileBatchRecord:
        """One batch with the counts of now.

        Raises:
            NotFound: this store of this tenant has none of that id.
        """
        stored, cancelled = await self._read(tenant, store_id, batch_id)
        files = await self._store_files.get_all(tenant, store_id, stored.file_ids)
        return FileBatchRecord(
            id=stored.id,
            vector_store_id=store_id,
            created_at=stored.created_at,
            counts=_counts(files),
            cancelled=cancelled,
        )

    async def cancel(self, tenant: str, store_id: str, batch_id: str) -> FileBatchRecord:
        """Stop the ingestion of its files that are not done.

        Raises:
            NotFound: as above.
        """
        stored, _ = await self._read(tenant, store_id, batch_id)
        async with translated("the catalog"):
            await self._redis.hset(StoreKeys(tenant, store_id).part("batch", batch_id), "cancelled", "1")
        for record in await self._store_files.get_all(tenant, store_id, stored.file_ids):
            if record.status == "in_progress":
                await self._store_files.cancel(tenant, store_id, record.file_id)
        return await self.get(tenant, store_id, batch_id)

    async def page(
        self, tenant: str, store_id: str, batch_id: str, query: PageQuery, status: FileStatus | None = None
    ) -> Page[StoreFileRecord]:
        """One page of a batch's files, all or those in one status.

        Raises:
            NotFound: as above.
            InvalidRequest: a cursor names nothing.
        """
        stored, _ = await self._read(tenant, store_id, batch_id)
        ids = stored.file_ids if query.order == "asc" else stored.file_ids[::-1]
        start = _index(ids, query.after, "after") + 1 if query.after else 0
        stop = _index(ids, query.before, "before") if query.before else len(ids)
        files = await self._store_files.get_all(tenant, store_id, ids[start:stop])
        files = [file for file in files if status in {None, file.status}]
        page = files[-query.limit :] if query.before and not query.after else files[: query.limit]
        return Page(items=page, has_more=len(files) > query.limit)

    @translated("the catalog")
    async def _read(self, tenant: str, store_id: str, batch_id: str) -> tuple[_Stored, bool]:
        key = StoreKeys(tenant, store_id).part("batch", batch_id)
        raw, cancelled = await self._redis.hmget(key, ["record", "cancelled"])
        if raw is None:
            raise NotFound(f"no such file batch: {batch_id[:80]}", "batch_id")
        return msgspec.json.decode(raw, type=_Stored), cancelled is not None


def _counts(files: Sequence[StoreFileRecord]) -> FileCounts:
    statuses = [file.status for file in files]
    return FileCounts(
        in_progress=statuses.count("in_progress"),
        completed=statuses.count("completed"),
        failed=statuses.count("failed"),
        cancelled=statuses.count("cancelled"),
    )


def _index(ids: Sequence[str], cursor: str, param: str) -> int:
    try:
        return ids.index(cursor)
    except ValueError:
        raise InvalidRequest(f"{param} names nothing in this list: {cursor[:80]!r}", param) from None
