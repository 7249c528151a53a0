"""What searches may find in each vector store, as the catalog last said.

`actors.retriever` asks once per search: one small question to the catalog as long as the store's generation
stands still. While the catalog cannot be reached, what was read last goes on being used.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from actors.errors import DeadlineExceeded, InvalidRequest, NotFound, Unavailable
from actors.stores.catalog_records import StoreFileRecord

_KEPT_STORES = 1000


class CatalogReader(Protocol):
    """The part of `actors.stores.catalog.Catalog` that is needed here."""

    async def generation(self, tenant: str, vector_store_id: str) -> int:
        """The store's generation."""

    async def published(self, tenant: str, vector_store_id: str) -> tuple[int, tuple[StoreFileRecord, ...]]:
        """The generation and the published files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedView:
    """One vector store as searches see it."""

    tenant: str
    vector_store_id: str
    generation: int
    files: Mapping[str, StoreFileRecord]  # by file id, in the order of their attachment
    versions: Mapping[tuple[str, str], StoreFileRecord]  # the same by (file id, version)
    last_known: bool = False  # the catalog was not reached: this is from before


class PublishedFiles:
    """Views of the stores searched last.

    Args:
        catalog: the truth.
    """

    def __init__(self, catalog: CatalogReader) -> None:
        self._catalog = catalog
        self._views: OrderedDict[tuple[str, str], PublishedView] = OrderedDict()

    async def view(self, tenant: str, vector_store_id: str, timeout_s: float) -> PublishedView:
        """What searches may find.

        Raises:
            NotFound: this tenant has no such store.
            InvalidRequest: the store has expired.
            Unavailable: the catalog cannot be reached, and never was for this store.
        """
        key = (tenant, vector_store_id)
        try:
            async with asyncio.timeout(timeout_s):
                view = await self._read(tenant, vector_store_id)
        except (NotFound, InvalidRequest):
            self._views.pop(key, None)
            raise
        except (Unavailable, DeadlineExceeded, TimeoutError):
            view = self._last_known(key)
        self._views[key] = view
        self._views.move_to_end(key)
        if len(self._views) > _KEPT_STORES:
            self._views.popitem(last=False)
        return view

    async def _read(self, tenant: str, vector_store_id: str) -> PublishedView:
        known = self._views.get((tenant, vector_store_id))
        if known is not None:
            generation = await self._catalog.generation(tenant, vector_store_id)
            if generation == known.generation:
                return replace(known, last_known=False)
        generation, records = await self._catalog.published(tenant, vector_store_id)
        return PublishedView(
            tenant=tenant,
            vector_store_id=vector_store_id,
            generation=generation,
            files={record.file_id: record for record in records},
            versions={(record.file_id, record.version): record for record in records},
        )

    def _last_known(self, key: tuple[str, str]) -> PublishedView:
        known = self._views.get(key)
        if known is None:
            raise Unavailable("the catalog cannot be reached", retry_after_s=1.0) from None
        return replace(known, last_known=True)
