"""The reading end of one request's tokens, inside a gateway.

`actors.handles.llm` pushes what comes over the bus; the gateway reads at its own pace. The engine's end is
told at once, however slow the reader is.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from actors.errors import ShoalError
from actors.types import TokenDelta, Usage


class TokenStream:
    """The deltas of one request, in order; an async iterator that ends after the delta with `usage`.

    Args:
        on_end: called exactly once, with None or the error, when the engine is done with the request: before
            a slow reader has read everything.
    """

    def __init__(self, on_end: Callable[[ShoalError | None], None]) -> None:
        self._deltas: deque[TokenDelta] = deque()
        self._error: ShoalError | None = None
        self._on_end = on_end
        self._wake: asyncio.Future[None] | None = None
        self._finished: asyncio.Future[None] | None = None
        self.ended = False  # the engine has finished or failed
        self.usage: Usage | None = None  # known at the end of a good answer

    def push(self, delta: TokenDelta) -> None:
        """Take a delta from the bus."""
        if self.ended:
            return
        self._deltas.append(delta)
        if delta.usage is not None:
            self.usage = delta.usage
            self.end(None)
        self._notify()

    def end(self, error: ShoalError | None) -> None:
        """Finish; later calls change nothing."""
        if self.ended:
            return
        self.ended = True
        self._error = error
        self._on_end(error)
        self._notify()
        if self._finished is not None and not self._finished.done():
            self._finished.set_result(None)

    @property
    def error(self) -> ShoalError | None:
        """Why it ended, once it has; None for a good end."""
        return self._error

    async def wait(self) -> None:
        """Return when a delta can be read.

        Raises:
            ShoalError: the request failed and nothing is left to read.
        """
        while not self._deltas:
            if self._error is not None:
                raise self._error
            if self.ended:
                return
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake

    async def wait_for_end(self) -> None:
        """Return when the engine is done with it; what has come can be read then."""
        if not self.ended:
            self._finished = asyncio.get_running_loop().create_future()
            await self._finished

    def take_ready(self) -> list[TokenDelta]:
        """Everything that has arrived and was not read, without waiting."""
        ready = list(self._deltas)
        self._deltas.clear()
        return ready

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> TokenDelta:
        await self.wait()
        if not self._deltas:
            raise StopAsyncIteration
        return self._deltas.popleft()

    def _notify(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)
