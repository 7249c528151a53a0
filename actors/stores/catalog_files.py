"""Uploaded files of each tenant: their records, not their bytes.

Reached as `Catalog.files`. Keys, under `shoal:{tenant}:`

    file:<file>          string: JSON of FileRecord
    file:<file>:stores   set of the vector stores it is in (kept by catalog_swap.lua)
    files                zset of file ids by sequence number
    files:<purpose>      the same for one purpose
    files:removed        zset of removed ids, for cursors
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
from redis.asyncio import Redis

from actors.errors import NotFound
from actors.stores.catalog_keys import REMOVED_KEPT, new_id, page_of_ids, scope, sequence
from actors.stores.catalog_records import FileRecord, Page, PageQuery, Purpose
from actors.stores.redis import translated


class Files:
    """Records of uploaded files.

    Args:
        redis: the client; replies are bytes.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis  # replies are bytes; the client's types allow more

    @staticmethod
    def new_id() -> str:
        """An id for a file that is about to be uploaded."""
        return new_id("file-")

    @translated("the catalog")
    async def add(self, tenant: str, file: FileRecord) -> FileRecord:
        """Make a file known whose bytes are already stored; returned with the time of now."""
        now, _ = await self._redis.time()
        record, file_id = replace(file, created_at=now), file.id
        place = await self._redis.incr(sequence(tenant))
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.set(scope(tenant, "file", file_id), msgspec.json.encode(record))
            pipe.zadd(scope(tenant, "files"), {file_id: place})
            pipe.zadd(scope(tenant, "files", file.purpose), {file_id: place})
            await pipe.execute()
        return record

    async def get(self, tenant: str, file_id: str) -> FileRecord:
        """One file.

        Raises:
            NotFound: this tenant has none of that id.
        """
        return (await self.get_all(tenant, [file_id]))[0]

    @translated("the catalog")
    async def get_all(self, tenant: str, file_ids: Sequence[str]) -> list[FileRecord]:
        """Several files, in the order asked for.

        Raises:
            NotFound: one of them does not exist; the message names it.
        """
        keys = [scope(tenant, "file", file_id) for file_id in file_ids]
        raws = await self._redis.mget(keys) if keys else []
        for file_id, raw in zip(file_ids, raws, strict=True):
            if raw is None:
                raise NotFound(f"no such file: {file_id[:80]}", "file_id")
        return [msgspec.json.decode(raw, type=FileRecord) for raw in raws]

    @translated("the catalog")
    async def page(self, tenant: str, query: PageQuery, purpose: Purpose | None = None) -> Page[FileRecord]:
        """One page of files."""
        order = scope(tenant, "files", purpose) if purpose else scope(tenant, "files")
        ids, more = await page_of_ids(self._redis, order, scope(tenant, "files", "removed"), query)
        raws = await self._redis.mget([scope(tenant, "file", one) for one in ids]) if ids else []
        found = [msgspec.json.decode(raw, type=FileRecord) for raw in raws if raw is not None]
        return Page(items=found, has_more=more)

    @translated("the catalog")
    async def stores_of(self, tenant: str, file_id: str) -> list[str]:
        """The vector stores that a file is in."""
        members = await self._redis.smembers(scope(tenant, "file", file_id, "stores"))
        return sorted(member.decode() for member in members)

    async def remove_in(self, pipe: Any, tenant: str, record: FileRecord) -> None:
        """Queue the removal of a file's record on a transaction.

        Args:
            pipe: an open redis pipeline; the caller executes it.
            tenant: whose file it is.
            record: the file.
        """
        place = await self._redis.zscore(scope(tenant, "files"), record.id)
        removed = scope(tenant, "files", "removed")
        pipe.delete(scope(tenant, "file", record.id), scope(tenant, "file", record.id, "stores"))
        pipe.zrem(scope(tenant, "files"), record.id)
        pipe.zrem(scope(tenant, "files", record.purpose), record.id)
        pipe.zadd(removed, {record.id: place or 0})
        pipe.zremrangebyrank(removed, 0, -REMOVED_KEPT - 1)
