"""The reading end of one answer, inside a gateway.

`actors.handles.generation` pushes what comes over the bus, from however many replicas it takes; the gateway
reads at its own pace. Readers that keep up are called one after the other in the next turn of the event loop
(`follow`): waking a task for each would cost more than the event that it sends. What a slow reader has not read is
merged, so it costs its text and ids and no more, and it slows nobody: the engine's end is told at once.
"""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import Awaitable, Callable

from actors.errors import ShoalError
from actors.types import TokenDelta

_MERGE_AT = 64  # unread deltas
MOST_UNREAD_TOKENS = 16_384  # their ids are 64 KB

# Takes deltas; returns None, or what to wait for before it takes more.
Write = Callable[[list[TokenDelta]], Awaitable[None] | None]


class TokenStream:
    """The deltas of one answer, in order; an async iterator that ends after the delta with `usage`."""

    def __init__(self) -> None:
        self._deltas: deque[TokenDelta] = deque()
        self._error: ShoalError | None = None
        self._wake: asyncio.Future[None] | None = None
        self._write: Write | None = None  # of a reader that has read everything
        self._turn: _Turn | None = None  # in which it is called
        self._pending: Awaitable[None] | None = None  # what `_write` waits for
        self._broke: Exception | None = None  # how `_write` failed
        self._finished: asyncio.Future[None] | None = None
        self._unread_tokens = 0
        self._merge_at = _MERGE_AT
        self.ended = False  # nothing more comes
        self.taken = False  # somebody has read of it

    def push(self, delta: TokenDelta) -> None:
        """Take a delta from the bus."""
        if self.ended:
            return
        if self._turn is not None and not self._deltas:
            self._turn.add(self)
        self._deltas.append(delta)
        self._unread_tokens += len(delta.token_ids)
        if delta.usage is not None:
            self.end(None)
        elif len(self._deltas) >= self._merge_at:
            self._merge()
        if self._turn is None:
            self._wake_reader()

    def end(self, error: ShoalError | None, *, drop_unread: bool = False) -> None:
        """Finish; later calls change nothing.

        Args:
            error: None: the answer is complete.
            drop_unread: the reader gets the error at once, without what it has not read.
        """
        if self.ended:
            return
        self.ended = True
        self._error = error
        if drop_unread:
            self._deltas.clear()
        self._wake_reader()
        if self._finished is not None and not self._finished.done():
            self._finished.set_result(None)

    def restart(self) -> None:
        """Forget everything: nobody has read of it, and the answer begins again."""
        self._deltas.clear()
        self._unread_tokens = 0

    @property
    def error(self) -> ShoalError | None:
        """Why it ended, once it has; None for a good end."""
        return self._error

    @property
    def unread_tokens(self) -> int:
        """Tokens that have come and were not read."""
        return self._unread_tokens

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

    async def follow(self, write: Write) -> None:
        """Hand every delta to `write`, as soon as it comes; return when the answer is complete.

        While `write` waits, deltas are kept for it as for any slow reader.

        Raises:
            ShoalError: the request failed; what came before was handed over.
            Exception: from `write`.
        """
        try:
            while True:
                if self._broke is not None:
                    raise self._broke
                if self._pending is not None:
                    pending, self._pending = self._pending, None
                    await pending
                elif self._deltas:
                    self.hand_over(write)
                elif self.ended:
                    await self.wait()
                    return
                else:
                    self._write, self._turn = write, _turn_of_this_loop()
                    self._wake = asyncio.get_running_loop().create_future()
                    await self._wake
                    self._write = self._turn = None
        finally:
            self._write = self._turn = None

    def hand_over(self, write: Write | None = None) -> None:
        """Give the reader all there is; called in its turn."""
        write = write or self._write
        if write is None or not self._deltas:
            return
        self.taken = True
        try:
            self._pending = write(self.take_ready())
        except Exception as error:  # the reader's own, and no concern of the others
            self._broke = error
        if self._pending is not None or self._broke is not None:
            self._write = self._turn = None
            self._wake_reader()

    def _wake_reader(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def wait_for_end(self) -> None:
        """Return when nothing more comes; what has come can be read then."""
        if not self.ended:
            self._finished = asyncio.get_running_loop().create_future()
            await self._finished

    def take_ready(self) -> list[TokenDelta]:
        """Everything that has arrived and was not read, without waiting."""
        ready = list(self._deltas)
        self._deltas.clear()
        self._unread_tokens = 0
        return ready

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> TokenDelta:
        if not self._deltas:
            await self.wait()
            if not self._deltas:
                raise StopAsyncIteration
        self.taken = True
        delta = self._deltas.popleft()
        self._unread_tokens -= len(delta.token_ids)
        return delta

    def _merge(self) -> None:
        """Join what was not read, by choice: order matters only within one."""
        merged: dict[int, list[TokenDelta]] = {}
        for delta in self._deltas:
            merged.setdefault(delta.choice, []).append(delta)
        self._deltas.clear()
        for deltas in merged.values():
            self._deltas.extend(_joined(deltas))
        self._merge_at = len(self._deltas) + _MERGE_AT


class _Turn:
    """Streams with something to hand over in the next turn of the event loop: one callback for all of them."""

    def __init__(self) -> None:
        self._streams: list[TokenStream] = []

    def add(self, stream: TokenStream) -> None:
        if not self._streams:
            asyncio.get_running_loop().call_soon(self._run)
        self._streams.append(stream)

    def _run(self) -> None:
        streams, self._streams = self._streams, []
        for stream in streams:
            stream.hand_over()


_turns: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Turn] = weakref.WeakKeyDictionary()


def _turn_of_this_loop() -> _Turn:
    loop = asyncio.get_running_loop()
    turn = _turns.get(loop)
    if turn is None:
        turn = _turns[loop] = _Turn()
    return turn


def _joined(deltas: list[TokenDelta]) -> list[TokenDelta]:
    """The same answer in as few deltas as can be: plain text joins, the rest stays as it is."""
    out: list[TokenDelta] = []
    run: list[TokenDelta] = []
    for delta in deltas:
        if delta.logprobs or delta.tool_calls or delta.finish_reason or delta.usage:
            out += _one(run)
            out.append(delta)
            run = []
        else:
            run.append(delta)
    return out + _one(run)


def _one(run: list[TokenDelta]) -> list[TokenDelta]:
    if len(run) < 2:
        return run
    text = "".join(delta.text for delta in run)
    token_ids = tuple(token_id for delta in run for token_id in delta.token_ids)
    return [TokenDelta(run[0].choice, text, token_ids)]
