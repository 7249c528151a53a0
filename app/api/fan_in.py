"""Several generations as one stream of deltas, for completions with several prompts."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Self

import msgspec

from actors.errors import ShoalError
from actors.handles.token_stream import Write
from actors.telemetry import StageClock
from actors.types import GenerationCall, TokenDelta, Usage
from app.api.context import abandon
from app.api.deps import GenerationStream, Session

_AHEAD = 64  # deltas that wait for a slow client before the streams are held up


async def open_all(session: Session, calls: Sequence[GenerationCall]) -> FanIn:
    """Start all generations at once; when one fails the others are cancelled.

    Raises:
        ShoalError: the first failure.
    """
    # One request has one clock: the first call's stages stand for all, which run side by side.
    clocks = [None, *(StageClock() for _ in calls[1:])]
    tasks = [
        asyncio.ensure_future(session.generate(call, clock))
        for call, clock in zip(calls, clocks, strict=True)
    ]
    try:
        streams = await asyncio.gather(*tasks)
    except BaseException:  # also a cancellation: nothing that was opened may stay open
        await asyncio.gather(*(abandon(task) for task in tasks))
        raise
    return FanIn(streams, choices_each=calls[0].request.sampling.n)


class FanIn:
    """Merges streams as their deltas come; choices are numbered across, usage is their sum on the last delta.

    Args:
        streams: one per prompt, in order.
        choices_each: choices of each stream.
    """

    def __init__(self, streams: Sequence[GenerationStream], choices_each: int) -> None:
        self.headers: Mapping[str, str] = streams[-1].headers
        self.expires_at = max(stream.expires_at for stream in streams)
        self._streams = streams
        self._running = len(streams)
        self._prompt = self._completion = self._cached = 0
        # None: one stream has ended.
        self._arrived: asyncio.Queue[TokenDelta | ShoalError | None] = asyncio.Queue(_AHEAD)
        self._pumps = [
            asyncio.ensure_future(self._pump(stream, index * choices_each))
            for index, stream in enumerate(streams)
        ]

    def __aiter__(self) -> Self:
        """Iterate once."""
        return self

    async def __anext__(self) -> TokenDelta:
        """The next delta of any stream.

        Raises:
            ShoalError: a stream failed.
        """
        while self._running:
            arrived = await self._arrived.get()
            if isinstance(arrived, ShoalError):
                raise arrived
            if arrived is not None:
                return arrived
            self._running -= 1
        raise StopAsyncIteration

    async def follow(self, write: Write) -> None:
        """Hand every delta to `write`, in the order in which the one queue has them."""
        async for delta in self:
            pending = write([delta])
            if pending is not None:
                await pending

    async def aclose(self) -> None:
        """Cancel whatever still runs."""
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        await asyncio.gather(*(stream.aclose() for stream in self._streams))

    async def _pump(self, stream: GenerationStream, offset: int) -> None:
        try:
            async for delta in stream:
                usage = None if delta.usage is None else self._total(delta.usage)
                await self._arrived.put(
                    msgspec.structs.replace(delta, choice=delta.choice + offset, usage=usage)
                )
            await self._arrived.put(None)
        except ShoalError as error:
            await self._arrived.put(error)
        except Exception:  # a bug is the reader's to report, and must not look like the end
            await self._arrived.put(ShoalError("internal error"))

    def _total(self, usage: Usage) -> Usage:
        """The sum up to now: a reader keeps the last one it sees."""
        self._prompt += usage.prompt_tokens
        self._completion += usage.completion_tokens
        self._cached += usage.cached_tokens
        return Usage(
            prompt_tokens=self._prompt, completion_tokens=self._completion, cached_tokens=self._cached
        )
