"""Changes of one store file's record: compare and swap, together with the job that they need.

Used by `actors.stores.catalog_store_files`, which decides what the records become. The swap itself, with the key
schema beneath a vector store, is catalog_swap.lua.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from redis.asyncio import Redis

from actors.errors import NotFound, Unavailable
from actors.policies.ingestion import KIND, IngestionTask
from actors.stores.catalog_keys import REMOVED_KEPT, StoreKeys, scope, sequence
from actors.stores.catalog_records import FILE_STATUSES, Attributes, StoreFileRecord
from actors.stores.catalog_stores import no_store
from actors.stores.jobs import JobLog
from actors.stores.redis import script, translated

TRIES = 20  # of one change against others

Decide = Callable[[StoreFileRecord], StoreFileRecord | None]
"""What a record becomes; None removes it."""


@dataclass(frozen=True, slots=True)
class Work:
    """A job that a change needs."""

    jobs: JobLog
    task: IngestionTask

    async def queue(self, pipe: Any, tenant: str) -> None:
        """Enqueue it on an open redis transaction."""
        payload = msgspec.to_builtins(self.task)
        await self.jobs.enqueue_in(pipe, KIND, tenant, payload, serial=self.task.serial)


@dataclass(frozen=True, slots=True)
class Swap:
    """One record's change."""

    file_id: str
    raw: bytes  # `old` as Redis holds it; empty for none
    old: StoreFileRecord | None
    new: StoreFileRecord | None  # None removes it


class Swaps:
    """Runs changes.

    Args:
        redis: the client; replies are bytes.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis  # replies are bytes; the client's types allow more
        self._swap = script(redis, "catalog_swap")

    @translated("the catalog")
    async def change(
        self, keys: StoreKeys, file_id: str, decide: Decide, work: Work | None = None
    ) -> StoreFileRecord | None:
        """Swap in what `decide` makes of a record; returns that, or None when nothing changed.

        Args:
            keys: of the store.
            file_id: the file.
            decide: may be asked several times.
            work: its job, in the same transaction.

        Raises:
            NotFound: no such store, or the file is not in it.
            Unavailable: others changed the record all the time.
        """
        for _ in range(TRIES):
            raw = await self._redis.hget(keys.part("files"), file_id)
            old = decoded(raw) if raw else None
            if old is None:
                raise no_file(keys.store_id, file_id)
            new = decide(old)
            if new == old:
                return None
            async with self._redis.pipeline(transaction=True) as pipe:
                await self.queue(pipe, keys, Swap(file_id, raw, old, new))
                if work:
                    await work.queue(pipe, keys.tenant)
                outcome = (await pipe.execute())[0]
            if outcome == b"done":
                return new
            if outcome == b"no_store":
                raise no_store(keys.store_id)
        raise contended()

    async def queue(self, pipe: Any, keys: StoreKeys, swap: Swap) -> None:
        """Put a swap on an open redis transaction; its reply is b"done", b"changed" or b"no_store"."""
        names = ("files", "order", "published", "progress", "removed")
        await self._swap(
            keys=[
                keys.store,
                *(keys.part(name) for name in names),
                scope(keys.tenant, "file", swap.file_id, "stores"),
                sequence(keys.tenant),
                *(keys.part("status", status) for status in FILE_STATUSES),
            ],
            args=[
                swap.file_id,
                keys.store_id,
                swap.raw,
                msgspec.json.encode(replace(swap.new, progress=0.0)) if swap.new else b"",
                FILE_STATUSES.index(swap.new.status) + 1 if swap.new else 0,
                int(_searchable(swap.old) != _searchable(swap.new)),
                REMOVED_KEPT,
            ],
            client=pipe,
        )


def _searchable(record: StoreFileRecord | None) -> tuple[str, Attributes] | None:
    return (record.version, record.attributes) if record and record.version else None


def decoded(raw: bytes, share: bytes | None = None) -> StoreFileRecord:
    """The record in the hash of files, with the share that is embedded."""
    record = msgspec.json.decode(raw, type=StoreFileRecord)
    if record.status == "completed":
        return replace(record, progress=1.0)
    return replace(record, progress=float(share)) if share else record


def no_file(store_id: str, file_id: str) -> NotFound:
    """The error for a file that is not in a vector store."""
    return NotFound(f"no such file in vector store {store_id[:80]}: {file_id[:80]}", "file_id")


def contended() -> Unavailable:
    """The error for a change that never got its turn."""
    return Unavailable("the catalog is busy with other changes of the same file", retry_after_s=0.5)
