"""Coalescing: everything put in during one event-loop tick leaves as one list.

`Coalescer` starts one send per tick (the control path: commands to a queue or replica). `Outbox` is read by a
generator, one list per wake-up (the way back: grants, and tokens on the bus). Neither has a timer: under load
frames grow by themselves, alone an item leaves at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")


class Coalescer(Generic[Item]):
    """Collects items and hands all of one tick to `send`, which runs as a task of its own.

    Args:
        send: delivers a list of items; it handles its own errors.
    """

    def __init__(self, send: Callable[[list[Item]], Coroutine[Any, Any, None]]) -> None:
        self._send = send
        self._items: list[Item] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def put(self, item: Item) -> None:
        """Add an item to the list that leaves at the end of this tick."""
        self._items.append(item)
        if len(self._items) == 1:
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        items, self._items = self._items, []
        task = asyncio.get_running_loop().create_task(self._send(items))
        self._tasks.add(task)  # the loop keeps only weak references
        task.add_done_callback(self._tasks.discard)


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
            if items:
                yield items
            if self._closed and not self._items:
                return
