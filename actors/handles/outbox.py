"""Coalescing: everything put in during one event-loop tick leaves as one list.

`Coalescer` has one send under way at a time (the control path: commands to a queue or replica): what is put in
meanwhile leaves with the next one, so lists arrive in order. `Outbox` is read by a generator, one list per wake-up
(the way back: grants, and tokens on the bus). Neither has a timer: under load frames grow by themselves, alone an
item leaves at once.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Generic, TypeVar

from actors.telemetry import logger

_MOST_ITEMS = 1024  # in one list: a frame must stay below gRPC's 4 MB, also after the reader was held up
_log = logger("outbox")

Item = TypeVar("Item")


class Coalescer(Generic[Item]):
    """Collects items and hands them to `send`, which runs as a task of its own.

    Args:
        send: delivers a list of items; it handles its own errors and ends within a time-out.
    """

    def __init__(self, send: Callable[[list[Item]], Coroutine[Any, Any, None]]) -> None:
        self._send = send
        self._items: list[Item] = []
        self._sending: asyncio.Task[None] | None = None

    def put(self, item: Item) -> None:
        """Add an item to the list that leaves at the end of this tick, or when the one before has arrived."""
        self._items.append(item)
        if len(self._items) == 1 and self._sending is None:
            # The list is everybody's: it must not leave in the context of the request that was first (`detached`).
            asyncio.get_running_loop().call_soon(self._flush, context=contextvars.Context())

    def _flush(self) -> None:
        if not self._items or self._sending is not None:
            return
        items, self._items = self._items, []
        self._sending = asyncio.get_running_loop().create_task(self._send(items))
        self._sending.add_done_callback(self._sent)

    def _sent(self, task: asyncio.Task[None]) -> None:
        self._sending = None
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("send_broke", error=repr(error))
        self._flush()


class Outbox(Generic[Item]):
    """A queue read in whole lists: one reader takes all that has gathered since it looked last."""

    def __init__(self) -> None:
        self._items: list[Item] = []
        self._filled = asyncio.Event()
        self._closed = False

    def put(self, item: Item) -> None:
        """Add an item; the reader wakes in this tick."""
        self._items.append(item)
        self._filled.set()

    def take(self) -> list[Item]:
        """Take what there is past the reader, as much as goes into one list."""
        taken, self._items = self._items[:_MOST_ITEMS], self._items[_MOST_ITEMS:]
        if not self._items and not self._closed:
            self._filled.clear()
        return taken

    def close(self) -> None:
        """End the reader once it has taken what is there."""
        self._closed = True
        self._filled.set()

    async def batches(self) -> AsyncIterator[list[Item]]:
        """Yield lists until closed; each holds everything put in before the reader came round."""
        while True:
            await self._filled.wait()
            await asyncio.sleep(0)  # let the rest of this tick (one engine step) join the frame
            self._filled.clear()
            items, self._items = self._items, []
            for start in range(0, len(items), _MOST_ITEMS):
                yield items[start : start + _MOST_ITEMS]
            if self._closed and not self._items:
                return
