"""Facts of a response as a stream of OpenAI's events: as they come from the model, or from the log of a stored one.

`LiveAnswer` and `FollowedAnswer` give facts, `ResponseEventStream` sends what `app.schemas.response_events` makes of
them. Made by `app.api.responses`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Protocol

import msgspec
from starlette.types import Send

from actors.errors import EngineFailed, ShoalError
from actors.policies.responses import Began, Ended, Fact, Said, Searched, failed, finished
from actors.types import TokenDelta
from app.api.context import log_unexpected
from app.api.deps import GenerationStream
from app.schemas.response_events import ResponseReader
from app.sse import EventStreamResponse, StreamContext, comment

_LONGEST_S = 86_400.0  # a reader of a durable stream may stay this long

Keep = Callable[[list[Fact]], Awaitable[bool]]


class FactSource(Protocol):
    """Facts of one response, in order; the last one is `Ended`."""

    @property
    def expires_at(self) -> float:
        """When it ends at the latest, in the event loop's time."""

    def __aiter__(self) -> AsyncIterator[list[Fact]]:
        """Iterate; an empty list means that nothing has come for a while."""

    async def aclose(self) -> None:
        """Stop; twice is once."""


class LiveAnswer:
    """An answer that is made while its caller waits.

    Args:
        stream: of the gateway, its first delta at hand.
        query: what was searched for; None: nothing was.
        keep: stores the facts, and returns whether they are stored; none: nothing came of the answer.

    Attributes:
        error: what ended it, if it failed.
    """

    def __init__(self, stream: GenerationStream, query: str | None, keep: Keep) -> None:
        self.expires_at = stream.expires_at
        self.error: ShoalError | None = None
        self._stream = stream
        self._keep: Keep | None = keep
        self._facts: list[Fact] = [Began()]
        if query is not None:
            degraded = stream.headers.get("x-shoal-degraded", "")
            self._facts.append(Searched(query=query, passages=tuple(stream.passages), degraded=degraded))

    async def __aiter__(self) -> AsyncIterator[list[Fact]]:
        """The facts; failures are facts, too."""
        yield list(self._facts)
        ended: Ended | None = None
        finish: list[TokenDelta] = []
        try:
            async for delta in self._stream:
                said = Said(delta)
                self._facts.append(said)
                yield [said]
                ended = finished([*finish, delta], int(time.time()))
                finish = [delta] if delta.finish_reason else finish
            if ended is None:
                raise EngineFailed("the engine ended before the answer was complete; try again")  # noqa: TRY301
        except Exception as error:
            self.error = _ours(error)
            ended = failed(self.error, int(time.time()))
        keep, self._keep = self._keep, None
        if keep is None or not await keep([*self._facts, ended]):
            ended = msgspec.structs.replace(ended, stored=False)
        yield [ended]

    async def aclose(self) -> None:
        """Cancel the work down to the engine."""
        await self._stream.aclose()
        keep, self._keep = self._keep, None
        if keep is not None:
            await keep([])


class FollowedAnswer:
    """An answer that is made elsewhere, or was.

    Args:
        facts: of the log, from its beginning.
    """

    def __init__(self, facts: AsyncIterator[list[Fact]]) -> None:
        self.expires_at = asyncio.get_running_loop().time() + _LONGEST_S
        self._facts = facts

    def __aiter__(self) -> AsyncIterator[list[Fact]]:
        """The facts as they come."""
        return self._facts

    async def aclose(self) -> None:
        """Stop listening; the answer goes on."""
        if hasattr(self._facts, "aclose"):
            await self._facts.aclose()


class ResponseEventStream(EventStreamResponse):
    """Sends one response as events; its last one is the response's own end, or an error event.

    Args:
        source: the facts.
        reader: makes events of them.
        context: of the request.
        headers: of the answer.
        starting_after: number of the last event that the client has; -1: none.
    """

    def __init__(
        self,
        source: FactSource,
        reader: ResponseReader,
        context: StreamContext,
        headers: Mapping[str, str] | None = None,
        starting_after: int = -1,
    ) -> None:
        super().__init__(source, reader, context, headers)  # type: ignore[arg-type]  # `_send_all` is our own
        self._source = source
        self._reader = reader
        self._after = starting_after

    async def _send_all(self, send: Send) -> bytes:
        send = self._context.past_middleware(send)
        try:
            frames = self._reader.skip_to(self._after, self._reader.opening)
            await send({"type": "http.response.body", "body": frames, "more_body": True})
            async for facts in self._source:
                frames = self._events(facts) if facts else comment("waiting")
                if facts and isinstance(facts[-1], Ended):
                    return frames
                if frames:
                    await send({"type": "http.response.body", "body": frames, "more_body": True})
            raise EngineFailed("the stream ended before the answer did; try again")  # noqa: TRY301
        except Exception as error:  # whatever broke, the client must not take the answer for complete
            return self._reader.broken(self._context.failed(error))

    def _events(self, facts: list[Fact]) -> bytes:
        reader = self._reader
        return reader.skip_to(self._after, lambda: b"".join(map(reader.add, facts)))


def _ours(error: Exception) -> ShoalError:
    if isinstance(error, ShoalError):
        return error
    log_unexpected(error)
    return ShoalError("internal error")
