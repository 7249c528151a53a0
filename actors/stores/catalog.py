"""The catalog in Redis: which files, vector stores, attachments and batches exist, and what is published.

The routers, ingestion and the retriever use it. It groups the modules `catalog_*`, each of which holds one kind
of record and its keys, and owns what spans several of them. Another tenant's ids do not exist: every key begins
with the tenant (`catalog_keys.scope`). Bodies of documents are `actors.stores.documents`.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from redis.asyncio import Redis

from actors.errors import NotFound
from actors.policies.ingestion import IngestionTask
from actors.stores.catalog_batches import FileBatches
from actors.stores.catalog_files import Files
from actors.stores.catalog_records import StoreFileRecord
from actors.stores.catalog_store_files import StoreFiles
from actors.stores.catalog_stores import VectorStores
from actors.stores.catalog_swaps import Work
from actors.stores.jobs import JobLog
from actors.stores.redis import translated


class Catalog:
    """All records of files and vector stores.

    Args:
        redis: the client of `actors.stores.redis.connect`.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis  # replies are bytes; the client's types allow more
        self.files = Files(redis)
        self.stores = VectorStores(redis)
        self.store_files = StoreFiles(redis)
        self.batches = FileBatches(redis, self.store_files)

    async def generation(self, tenant: str, vector_store_id: str) -> int:
        """The store's generation: it grows whenever searches in it may find something else.

        Asking counts as use and puts off the store's expiry: call it once per search.

        Raises:
            NotFound: this tenant has no such store.
            InvalidRequest: the store has expired.
        """
        return await self.stores.use(tenant, vector_store_id)

    async def published(self, tenant: str, vector_store_id: str) -> tuple[int, tuple[StoreFileRecord, ...]]:
        """The generation and every file that searches may find, each with its published version.

        When something changes meanwhile, the files are newer than the generation: a reader that compares
        generations reads once more, and never misses a change.

        Raises:
            NotFound, InvalidRequest: as above.
        """
        generation = await self.generation(tenant, vector_store_id)
        return generation, await self.store_files.published(tenant, vector_store_id)

    @translated("the catalog")
    async def delete_store(self, tenant: str, vector_store_id: str, jobs: JobLog) -> None:
        """Remove a vector store at once; what it holds goes by a job in the same transaction.

        Raises:
            NotFound: this tenant has no such store.
        """
        await self.stores.get(tenant, vector_store_id)
        task = IngestionTask(action="drop_store", vector_store_id=vector_store_id)
        async with self._redis.pipeline(transaction=True) as pipe:
            await self.stores.remove_in(pipe, tenant, vector_store_id)
            await Work(jobs, task).queue(pipe, tenant)
            await pipe.execute()

    @translated("the catalog")
    async def delete_file(self, tenant: str, file_id: str, jobs: JobLog) -> None:
        """Remove a file from every vector store and then itself; its bytes go by a job.

        Raises:
            NotFound: this tenant has no such file.
        """
        record = await self.files.get(tenant, file_id)
        for store_id in await self.files.stores_of(tenant, file_id):
            with suppress(NotFound):  # the store was removed, or the file from it, at the same time
                await self.store_files.remove(tenant, store_id, file_id, jobs)
        task = IngestionTask(action="drop_file", file_id=file_id)
        async with self._redis.pipeline(transaction=True) as pipe:
            await self.files.remove_in(pipe, tenant, record)
            await Work(jobs, task).queue(pipe, tenant)
            await pipe.execute()
