"""Vector stores of each tenant.

Reached as `Catalog.stores`. Keys, under `shoal:{tenant}:`

    vs:<store>   hash: record (JSON of what does not count), generation, usage_bytes, last_active_at,
                 expires_after_s ('' for never); what lies beneath is described in catalog_swap.lua
    stores       zset of store ids by sequence number
    stores:removed   zset of removed ids, for cursors
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
from redis.asyncio import Redis
from redis.exceptions import WatchError

from actors.errors import Conflict, InvalidRequest, NotFound
from actors.stores.catalog_keys import REMOVED_KEPT, StoreKeys, new_id, page_of_ids, scope, sequence
from actors.stores.catalog_records import (
    FILE_STATUSES,
    FileCounts,
    Page,
    PageQuery,
    VectorStoreRecord,
    check_metadata,
)
from actors.stores.redis import script, translated

_NAME_CHARS = 256
_DAY_S = 86_400
_MAX_DAYS = 365


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreSettings:
    """What a caller chooses about a vector store; checked when it is written."""

    name: str = ""
    description: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    expires_after_days: int | None = None  # 1 to 365

    def check(self) -> None:
        """Refuse what is out of OpenAI's bounds."""
        check_metadata(self.metadata)
        if len(self.name) > _NAME_CHARS:
            raise InvalidRequest(f"name may have at most {_NAME_CHARS} characters", "name")
        if self.expires_after_days is not None and not 1 <= self.expires_after_days <= _MAX_DAYS:
            raise InvalidRequest(f"days must be between 1 and {_MAX_DAYS}", "expires_after.days")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stored:
    """The JSON in the hash's `record`: what no script changes."""

    id: str
    created_at: int
    settings: StoreSettings


class VectorStores:
    """Records of vector stores.

    Args:
        redis: the client; replies are bytes.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis  # replies are bytes; the client's types allow more
        self._use = script(redis, "catalog_use")

    @translated("the catalog")
    async def create(self, tenant: str, settings: StoreSettings) -> VectorStoreRecord:
        """Make an empty vector store.

        Raises:
            InvalidRequest: a setting is out of bounds.
        """
        settings.check()
        now, _ = await self._redis.time()
        store_id = new_id("vs_")
        place = await self._redis.incr(sequence(tenant))
        async with self._redis.pipeline(transaction=True) as pipe:
            self._write(pipe, tenant, _Stored(id=store_id, created_at=now, settings=settings))
            counters = {"generation": 0, "usage_bytes": 0, "last_active_at": now}
            pipe.hset(StoreKeys(tenant, store_id).store, mapping=counters)
            pipe.zadd(scope(tenant, "stores"), {store_id: place})
            await pipe.execute()
        return await self.get(tenant, store_id)

    async def get(self, tenant: str, store_id: str) -> VectorStoreRecord:
        """One vector store.

        Raises:
            NotFound: this tenant has none of that id.
        """
        found = await self._read(tenant, [store_id])
        if not found:
            raise no_store(store_id)
        return found[0]

    async def update(self, tenant: str, store_id: str, changes: Mapping[str, Any]) -> VectorStoreRecord:
        """Change some settings.

        Args:
            tenant: whose store it is.
            store_id: the store.
            changes: new values by the field names of `StoreSettings`.

        Raises:
            NotFound, InvalidRequest: as above.
            Conflict: another change came between; nothing was changed.
        """
        key = StoreKeys(tenant, store_id).store
        async with translated("the catalog"), self._redis.pipeline(transaction=True) as pipe:
            await pipe.watch(key)
            raw = await pipe.hget(key, "record")
            if raw is None:
                raise no_store(store_id)
            stored = msgspec.json.decode(raw, type=_Stored)
            settings = replace(stored.settings, **changes)
            settings.check()
            pipe.multi()
            self._write(pipe, tenant, replace(stored, settings=settings))
            try:
                await pipe.execute()
            except WatchError:
                raise Conflict(f"the vector store {store_id} was changed at the same time") from None
        return await self.get(tenant, store_id)

    @translated("the catalog")
    async def page(self, tenant: str, query: PageQuery) -> Page[VectorStoreRecord]:
        """One page of vector stores."""
        removed = scope(tenant, "stores", "removed")
        ids, more = await page_of_ids(self._redis, scope(tenant, "stores"), removed, query)
        return Page(items=await self._read(tenant, ids), has_more=more)

    @translated("the catalog")
    async def use(self, tenant: str, store_id: str) -> int:
        """Note that the store is used, and return its generation.

        Raises:
            NotFound: as above.
            InvalidRequest: it has expired.
        """
        generation = int(await self._use(keys=[StoreKeys(tenant, store_id).store]))
        if generation == -1:
            raise no_store(store_id)
        if generation == -2:
            raise InvalidRequest(f"the vector store {store_id} has expired", "vector_store_id")
        return generation

    @translated("the catalog")
    async def exists(self, tenant: str, store_id: str) -> bool:
        """Whether there is such a store, expired or not."""
        return bool(await self._redis.exists(StoreKeys(tenant, store_id).store))

    async def remove_in(self, pipe: Any, tenant: str, store_id: str) -> None:
        """Queue the store's removal on a transaction; what lies beneath is `forget`'s, later.

        Args:
            pipe: an open redis pipeline; the caller executes it.
            tenant: whose store it is.
            store_id: the store.
        """
        place = await self._redis.zscore(scope(tenant, "stores"), store_id)
        removed = scope(tenant, "stores", "removed")
        pipe.delete(StoreKeys(tenant, store_id).store)
        pipe.zrem(scope(tenant, "stores"), store_id)
        pipe.zadd(removed, {store_id: place or 0})
        pipe.zremrangebyrank(removed, 0, -REMOVED_KEPT - 1)

    @translated("the catalog")
    async def forget(self, tenant: str, store_id: str) -> None:
        """Remove everything beneath a removed store."""
        keys = StoreKeys(tenant, store_id)
        async with self._redis.pipeline(transaction=False) as pipe:
            for file_id in await self._redis.hkeys(keys.part("files")):
                pipe.srem(scope(tenant, "file", file_id.decode(), "stores"), store_id)
            for batch_id in await self._redis.smembers(keys.part("batches")):
                pipe.unlink(keys.part("batch", batch_id.decode()))
            names = ("files", "order", "published", "progress", "removed", "batches")
            pipe.unlink(*(keys.part(name) for name in names))
            pipe.unlink(*(keys.part("status", status) for status in FILE_STATUSES))
            await pipe.execute()

    @staticmethod
    def _write(pipe: Any, tenant: str, stored: _Stored) -> None:
        days = stored.settings.expires_after_days
        fields = {
            "record": msgspec.json.encode(stored),
            "expires_after_s": "" if days is None else days * _DAY_S,
        }
        pipe.hset(StoreKeys(tenant, stored.id).store, mapping=fields)

    @translated("the catalog")
    async def _read(self, tenant: str, store_ids: Sequence[str]) -> list[VectorStoreRecord]:
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.time()
            for store_id in store_ids:
                keys = StoreKeys(tenant, store_id)
                pipe.hgetall(keys.store)
                for status in FILE_STATUSES:
                    pipe.zcard(keys.part("status", status))
            (now, _), *rows = await pipe.execute()
        width = 1 + len(FILE_STATUSES)
        groups = [rows[at : at + width] for at in range(0, len(rows), width)]
        return [_record(group[0], group[1:], now) for group in groups if b"record" in group[0]]


def no_store(store_id: str) -> NotFound:
    """The error for a vector store that a tenant does not have."""
    return NotFound(f"no such vector store: {store_id[:80]}", "vector_store_id")


def _record(fields: Mapping[bytes, bytes], counts: Sequence[int], now: int) -> VectorStoreRecord:
    stored = msgspec.json.decode(fields[b"record"], type=_Stored)
    record = VectorStoreRecord(
        id=stored.id,
        name=stored.settings.name,
        description=stored.settings.description,
        metadata=stored.settings.metadata,
        expires_after_days=stored.settings.expires_after_days,
        created_at=stored.created_at,
        last_active_at=int(fields[b"last_active_at"]),
        generation=int(fields[b"generation"]),
        usage_bytes=int(fields[b"usage_bytes"]),
        counts=FileCounts(**dict(zip(FILE_STATUSES, counts, strict=True))),
    )
    return replace(record, expired=record.expires_at is not None and now >= record.expires_at)
