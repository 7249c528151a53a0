"""Keeps a BM25 index per vector store and rebuilds it, in a thread, when the store's generation moved.

`actors.retriever` asks it. The documents are read through `ReadEntries`, so the truth is wherever the caller
has it. An index that is out of date still answers while a large one is rebuilt; that it finds nothing that was
deleted is the business of the caller's filter.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass

from actors.index.bm25 import Bm25Index, FileKey
from actors.index.protocol import IndexEntry
from actors.telemetry import logger

ReadEntries = Callable[[FileKey], Awaitable[Sequence[IndexEntry]]]

_READS_AT_ONCE = 8
_WORTH_WAITING_S = 0.25  # a rebuild that takes no longer is waited for: what was just published is found
_BUSY_SHARE = 0.2  # of the time at most is spent rebuilding one store, however fast its generation moves
_log = logger("index.bm25")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What an index is to hold."""

    generation: int
    files: Collection[FileKey]  # in their published order


@dataclass(frozen=True, slots=True)
class _Built:
    generation: int
    index: Bm25Index
    took_s: float
    at: float  # monotonic, when it was done


class Bm25Cache:
    """Indexes of the stores searched last.

    Args:
        max_bytes: what they may take together; the one in use stays, however large.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._built: OrderedDict[str, _Built] = OrderedDict()
        self._builds: dict[str, asyncio.Task[_Built]] = {}

    async def get(self, store: str, wanted: Wanted, read: ReadEntries) -> Bm25Index:
        """The store's index, built or rebuilt if it must be. Cancelling does not stop a build under way.

        Args:
            store: the cache key.
            wanted: what the index should hold.
            read: the entries of one document version.

        Raises:
            ShoalError: what `read` raised, when there is no older index to answer with.
        """
        built = self._built.get(store)
        if built is not None:
            self._built.move_to_end(store)
            if built.generation == wanted.generation:
                return built.index
            if not self._due(store, built):
                return built.index
        build = self._builds.get(store) or self._start(store, wanted, read)
        if built is None:
            return (await asyncio.shield(build)).index
        if built.took_s <= _WORTH_WAITING_S:
            await asyncio.wait([build])
        return self._built.get(store, built).index

    def _due(self, store: str, built: _Built) -> bool:
        return store in self._builds or time.monotonic() - built.at >= built.took_s / _BUSY_SHARE

    def _start(self, store: str, wanted: Wanted, read: ReadEntries) -> asyncio.Task[_Built]:
        build = asyncio.get_running_loop().create_task(self._build(store, wanted, read))
        self._builds[store] = build
        build.add_done_callback(lambda task: self._ended(store, task))
        return build

    def _ended(self, store: str, build: asyncio.Task[_Built]) -> None:
        del self._builds[store]
        if not build.cancelled() and build.exception() is not None:
            _log.warning("bm25_build_failed", error=repr(build.exception()))

    async def _build(self, store: str, wanted: Wanted, read: ReadEntries) -> _Built:
        started = time.monotonic()
        before = self._built.get(store)
        previous = before.index if before else Bm25Index()
        fresh = await _read_all([key for key in wanted.files if key not in previous.files], read)
        index = await asyncio.to_thread(previous.replaced, wanted.files, fresh)
        now = time.monotonic()
        built = _Built(wanted.generation, index, now - started, now)
        self._built[store] = built
        self._evict()
        _log.info("bm25_built", files=len(wanted.files), fresh=len(fresh), took_s=round(built.took_s, 3))
        return built

    def _evict(self) -> None:
        total = sum(built.index.size_bytes for built in self._built.values())
        while total > self._max_bytes and len(self._built) > 1:
            _, gone = self._built.popitem(last=False)
            total -= gone.index.size_bytes


async def _read_all(keys: Sequence[FileKey], read: ReadEntries) -> dict[FileKey, Sequence[IndexEntry]]:
    room = asyncio.Semaphore(_READS_AT_ONCE)

    async def one(key: FileKey) -> Sequence[IndexEntry]:
        async with room:
            return await read(key)

    return dict(zip(keys, await asyncio.gather(*(one(key) for key in keys)), strict=True))
