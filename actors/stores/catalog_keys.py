"""Where the catalog keeps things: the one function that scopes to a tenant, and ordered listings.

Used by the modules `catalog_*` only. Every key of a tenant begins with what `scope` returns; nobody builds one
otherwise. The tenant is a hash tag.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

from actors.errors import InvalidRequest
from actors.stores.catalog_records import PageQuery
from actors.stores.key_records import check_tenant

REMOVED_KEPT = 10_000  # removed ids that still work as cursors, per listing


def scope(tenant: str, *parts: str) -> str:
    """The Redis key `shoal:{tenant}:part:part…`.

    Raises:
        InvalidRequest: not a tenant's name.
    """
    check_tenant(tenant)
    return ":".join(("shoal", f"{{{tenant}}}", *parts))


def new_id(prefix: str) -> str:
    """A fresh id that nobody can guess."""
    return prefix + secrets.token_hex(12)


def sequence(tenant: str) -> str:
    """Key of the counter that orders everything of a tenant."""
    return scope(tenant, "sequence")


@dataclass(frozen=True, slots=True)
class StoreKeys:
    """The keys of one vector store."""

    tenant: str
    store_id: str

    @property
    def store(self) -> str:
        """Hash: record, generation, usage_bytes, last_active_at, expires_after_s."""
        return scope(self.tenant, "vs", self.store_id)

    def part(self, *names: str) -> str:
        """A key beneath the store: files, order, published, progress, removed, `status:…` or `batch:…`."""
        return ":".join((self.store, *names))


async def page_of_ids(
    redis: Any, order_key: str, removed_key: str, query: PageQuery
) -> tuple[list[str], bool]:
    """One page of ids from a zset that orders them, and whether more follow in the direction of travel.

    Args:
        redis: the client.
        order_key: zset of ids by sequence number.
        removed_key: zset of removed ids: a caller who deletes while paging holds a cursor on one of them.
        query: the page.

    Raises:
        InvalidRequest: a cursor names nothing.
    """
    after = await _place(redis, order_key, removed_key, query.after, "after")
    before = await _place(redis, order_key, removed_key, query.before, "before")
    descending = query.order == "desc"
    low, high = (before, after) if descending else (after, before)
    low_bound, high_bound = ("-inf" if low is None else f"({low}"), ("+inf" if high is None else f"({high}")
    # A page that ends before a cursor is read backwards from it.
    backwards = before is not None and after is None
    from_top = descending != backwards
    bounds = (high_bound, low_bound) if from_top else (low_bound, high_bound)
    found = await redis.zrange(
        order_key, *bounds, desc=from_top, byscore=True, offset=0, num=query.limit + 1
    )  # fmt: skip
    ids = [member.decode() for member in found[: query.limit]]
    return (ids[::-1] if backwards else ids), len(found) > query.limit


async def _place(redis: Any, order_key: str, removed_key: str, cursor: str | None, param: str) -> int | None:
    if cursor is None:
        return None
    for key in (order_key, removed_key):
        score = await redis.zscore(key, cursor)
        if score is not None:
            return int(score)
    raise InvalidRequest(f"{param} names nothing in this list: {cursor[:80]!r}", param)
