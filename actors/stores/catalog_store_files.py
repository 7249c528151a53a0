"""The files of a vector store: attached, ingested, published, cancelled, removed.

Reached as `Catalog.store_files`. The routers attach and remove, `actors.ingestion` publishes. Every change is a
compare-and-swap of one record (`catalog_swaps`), which keeps order, counts, usage and generation in step; a
change that needs work adds its job in the same transaction.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from redis.asyncio import Redis

from actors.errors import NotFound
from actors.policies.ingestion import IngestionTask
from actors.stores.catalog_keys import StoreKeys, page_of_ids
from actors.stores.catalog_records import (
    Attachment,
    Attributes,
    FileRecord,
    FileStatus,
    LastError,
    Page,
    PageQuery,
    StoreFileRecord,
    check_attributes,
)
from actors.stores.catalog_stores import no_store
from actors.stores.catalog_swaps import TRIES, Swap, Swaps, Work, contended, decoded, no_file
from actors.stores.jobs import JobLog
from actors.stores.redis import script, translated

_BATCH = 100  # records per transaction or read: a bound on how long Redis serves nobody else


class StoreFiles:
    """Records of files in vector stores.

    Args:
        redis: the client; replies are bytes.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis  # replies are bytes; the client's types allow more
        self._swaps = Swaps(redis)
        self._progress = script(redis, "catalog_progress")

    # --- reading -------------------------------------------------------------------------------------

    async def get(self, tenant: str, store_id: str, file_id: str) -> StoreFileRecord:
        """One file of a vector store.

        Raises:
            NotFound: it is not in this store of this tenant.
        """
        found = await self.get_all(tenant, store_id, [file_id])
        if not found:
            raise no_file(store_id, file_id)
        return found[0]

    @translated("the catalog")
    async def get_all(self, tenant: str, store_id: str, file_ids: Sequence[str]) -> list[StoreFileRecord]:
        """Those of these files that are in the store, with their progress."""
        keys, found = StoreKeys(tenant, store_id), []
        for some in _slices(file_ids, _BATCH):
            raws = await self._redis.hmget(keys.part("files"), some)
            shares = await self._redis.hmget(keys.part("progress"), some)
            found += [decoded(raw, share) for raw, share in zip(raws, shares, strict=True) if raw]
        return found

    @translated("the catalog")
    async def page(
        self, tenant: str, store_id: str, query: PageQuery, status: FileStatus | None = None
    ) -> Page[StoreFileRecord]:
        """One page of a store's files, all or those in one status."""
        keys = StoreKeys(tenant, store_id)
        order = keys.part("status", status) if status else keys.part("order")
        # A cursor may have changed its status since: places are the same in all lists.
        fallback = keys.part("order") if status else keys.part("removed")
        ids, more = await page_of_ids(self._redis, order, fallback, query)
        return Page(items=await self.get_all(tenant, store_id, ids), has_more=more)

    @translated("the catalog")
    async def published(self, tenant: str, store_id: str) -> tuple[StoreFileRecord, ...]:
        """Every file with a published version, in the order of their attachment."""
        ids = await self._redis.zrange(StoreKeys(tenant, store_id).part("published"), 0, -1)
        records = await self.get_all(tenant, store_id, [one.decode() for one in ids])
        return tuple(record for record in records if record.version)

    # --- changes that callers ask for ----------------------------------------------------------------

    async def attach(
        self, tenant: str, store_id: str, wanted: Iterable[tuple[FileRecord, Attachment]], jobs: JobLog
    ) -> list[StoreFileRecord]:
        """Attach files and enqueue their ingestion; attaching again without a difference changes nothing.

        A file that is attached again with another chunking keeps serving its old version meanwhile.

        Args:
            tenant: whose store and files they are.
            store_id: the store.
            wanted: the files, each with how to attach it.
            jobs: where the ingestion is enqueued.

        Raises:
            NotFound: no such store.
            InvalidRequest: attributes are out of bounds.
        """
        pending = {file.id: (file, attachment) for file, attachment in wanted}
        for _, attachment in pending.values():
            check_attributes(attachment.attributes)
        now, _ = await self._now()
        done: dict[str, StoreFileRecord] = {}
        for _ in range(TRIES):
            todo = [one for file_id, one in pending.items() if file_id not in done]
            if not todo:
                return [done[file_id] for file_id in pending]
            for some in _slices(todo, _BATCH):
                done |= await self._attach_some(StoreKeys(tenant, store_id), some, now, jobs)
        raise contended()

    async def remove(self, tenant: str, store_id: str, file_id: str, jobs: JobLog) -> None:
        """Take a file out of a store; what is stored of it goes by a job.

        Raises:
            NotFound: it is not in this store of this tenant.
        """
        task = IngestionTask(action="sync_file", vector_store_id=store_id, file_id=file_id)
        await self._swaps.change(StoreKeys(tenant, store_id), file_id, _removed, Work(jobs, task))

    async def set_attributes(
        self, tenant: str, store_id: str, file_id: str, attributes: Attributes, jobs: JobLog
    ) -> StoreFileRecord:
        """Replace a file's attributes, in the catalog at once and in the index by a job.

        Raises:
            NotFound: it is not in this store of this tenant.
            InvalidRequest: attributes are out of bounds.
        """
        check_attributes(attributes)
        task = IngestionTask(action="sync_file", vector_store_id=store_id, file_id=file_id, refresh=True)

        def decide(old: StoreFileRecord) -> StoreFileRecord | None:
            return replace(old, attributes=dict(attributes))

        changed = await self._swaps.change(StoreKeys(tenant, store_id), file_id, decide, Work(jobs, task))
        return changed or await self.get(tenant, store_id, file_id)

    async def cancel(self, tenant: str, store_id: str, file_id: str) -> None:
        """Stop the ingestion of a file that is in progress; any other file stays as it is."""

        def decide(old: StoreFileRecord) -> StoreFileRecord | None:
            return replace(old, status="cancelled") if old.status == "in_progress" else old

        await self._swaps.change(StoreKeys(tenant, store_id), file_id, decide)

    # --- changes that ingestion makes ----------------------------------------------------------------

    async def publish(self, record: StoreFileRecord, tenant: str, version: str, usage_bytes: int) -> bool:
        """Make a version the one that searches find; False when the file is not wanted any more.

        Args:
            record: the file as ingestion found it: of this attachment only.
            tenant: whose store it is.
            version: the document version, complete in the document store and in the index.
            usage_bytes: what it takes.
        """
        published = {
            "status": "completed",
            "version": version,
            "usage_bytes": usage_bytes,
            "last_error": None,
        }
        return await self._finish(tenant, record, published)

    async def fail(self, record: StoreFileRecord, tenant: str, error: LastError) -> bool:
        """Note that a file cannot be ingested; a version published before stays."""
        return await self._finish(tenant, record, {"status": "failed", "last_error": error})

    @translated("the catalog")
    async def progress(self, record: StoreFileRecord, tenant: str, share: float) -> bool:
        """Note the share of embedded chunks; False when the file is not wanted any more."""
        keys = StoreKeys(tenant, record.vector_store_id)
        wanted = await self._progress(
            keys=[keys.part("files"), keys.part("progress")],
            args=[record.file_id, record.revision, f"{share:.4f}"],
        )
        return bool(wanted)

    # --- how -----------------------------------------------------------------------------------------

    async def _finish(self, tenant: str, record: StoreFileRecord, changes: dict[str, Any]) -> bool:
        def decide(old: StoreFileRecord) -> StoreFileRecord | None:
            wanted = old.revision == record.revision and old.status == "in_progress"
            return replace(old, **changes) if wanted else old

        try:
            keys = StoreKeys(tenant, record.vector_store_id)
            return await self._swaps.change(keys, record.file_id, decide) is not None
        except NotFound:
            return False

    @translated("the catalog")
    async def _attach_some(
        self, keys: StoreKeys, some: Sequence[tuple[FileRecord, Attachment]], now: int, jobs: JobLog
    ) -> dict[str, StoreFileRecord]:
        raws = await self._redis.hmget(keys.part("files"), [file.id for file, _ in some])
        done, written = {}, []
        async with self._redis.pipeline(transaction=True) as pipe:
            for (file, attachment), raw in zip(some, raws, strict=True):
                old = decoded(raw) if raw else None
                new, refresh = _attached(old, file, attachment, keys.store_id, now)
                if new == old:
                    done[file.id] = new
                    continue
                written.append((new, len(pipe)))
                await self._swaps.queue(pipe, keys, Swap(file.id, raw or b"", old, new))
                task = IngestionTask(
                    action="sync_file", vector_store_id=keys.store_id, file_id=file.id, refresh=refresh
                )
                await Work(jobs, task).queue(pipe, keys.tenant)
            outcomes = await pipe.execute()
        for new, at in written:
            if outcomes[at] == b"no_store":
                raise no_store(keys.store_id)
            if outcomes[at] == b"done":
                done[new.file_id] = new
        return done

    @translated("the catalog")
    async def _now(self) -> tuple[int, int]:
        now: tuple[int, int] = await self._redis.time()
        return now


def _attached(
    old: StoreFileRecord | None, file: FileRecord, attachment: Attachment, store_id: str, now: int
) -> tuple[StoreFileRecord, bool]:
    """The record after attaching, and whether only its index entries need writing again."""
    attributes = dict(attachment.attributes)
    if old and old.chunking == attachment.chunking and old.status in {"in_progress", "completed"}:
        return replace(old, attributes=attributes), True
    fresh = StoreFileRecord(
        file_id=file.id,
        vector_store_id=store_id,
        filename=file.filename,
        created_at=old.created_at if old else now,
        revision=secrets.token_hex(8),
        attributes=attributes,
        chunking=attachment.chunking,
        version=old.version if old else "",
        usage_bytes=old.usage_bytes if old else 0,
    )
    return fresh, False


def _removed(_old: StoreFileRecord) -> StoreFileRecord | None:
    return None


def _slices(items: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    return (items[at : at + size] for at in range(0, len(items), size))
