"""Event streams: bytes of server-sent events, and the ASGI response that sends them.

Every streaming route builds an `EventStreamResponse` from a stream of deltas and an encoder. What an event says
is the encoder's (`app.schemas`), when the client has left is the request context's (`app.api.context`).

The cost per token is what matters here: one encoded frame and one `send`, which is run where the token arrives, without
a task's turn; only one that must wait for a slow client is left to the response's own task.
"""

from __future__ import annotations

import asyncio
import types
from collections.abc import Awaitable, Coroutine, Generator, Mapping
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from actors.errors import ClientClosed, ShoalError
from actors.handles.token_stream import Write
from actors.types import TokenDelta
from app.schemas.bad_input import error_object

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
_LAST_READ_S = 30.0  # behind the deadline, for the error event
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # proxies pass each event on at once


class DeltaStream(Protocol):
    """Deltas of one answer. Closing it cancels the work behind it, down to the engine; twice is once."""

    @property
    def expires_at(self) -> float:
        """When the work ends at the latest, in the event loop's time."""

    async def follow(self, write: Write) -> None:
        """Hand every delta to `write`, to the last one; raises `ShoalError` when the work fails."""

    async def aclose(self) -> None:
        """Stop the work."""


class EventEncoder(Protocol):
    """Turns deltas into events. Each method returns whole events, or nothing."""

    def opening(self) -> bytes:
        """Events before the first delta."""

    def event(self, delta: TokenDelta) -> bytes:
        """The event of one delta; empty when it says nothing."""

    def closing(self) -> bytes:
        """Events after the last delta, without `[DONE]`.

        Raises:
            EngineFailed: the stream ended before the answer did.
        """


class StreamContext(Protocol):
    """What a stream needs of the request it answers."""

    async def guard(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` until it ends or the client leaves: then cancel it and raise `ClientClosed`."""

    def failed(self, error: Exception) -> ShoalError:
        """Note a failure after the answer began; returns what the caller may know of it."""

    def server_timing(self) -> str:
        """The stages up to now."""

    def past_middleware(self, send: Send) -> Send:
        """What sends the rest of an answer whose head is out: the frameworks' wrappers have no part in it."""


def event(value: Any) -> bytes:
    """One data event that holds `value` as JSON."""
    return b"data: %b\n\n" % msgspec.json.encode(value)


def json_text(text: str) -> bytes:
    """A JSON string, quotes included."""
    return msgspec.json.encode(text)


def comment(text: str) -> bytes:
    """A line that clients skip."""
    return b": %b\n\n" % text.encode()


def template(value: Mapping[str, Any], hole: str) -> tuple[bytes, bytes]:
    """What stands before and after the JSON string `hole` in the event of `value`.

    Encoding the constant part once leaves one small encode and two joins per token.

    Args:
        value: the event, with `hole` as the string to be replaced.
        hole: a string that occurs once.
    """
    before, after = event(value).split(json_text(hole))
    return before, after


class EventStreamResponse(Response):
    """Sends a stream of deltas as server-sent events and closes the stream, however it ends.

    An error after the start is one error event and the end, without `[DONE]`: the client can tell it from a
    complete answer. Complete answers end with the stages as a comment, then `[DONE]`.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        stream: DeltaStream,
        encoder: EventEncoder,
        context: StreamContext,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._stream = stream
        self._encoder = encoder
        self._context = context
        self.status_code = 200
        self.background = None
        # No `body`: with one, `init_headers` would promise its length.
        self.init_headers({**_HEADERS, **(headers or {})})

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """Answer; `receive` is watched by the context, which the request's middleware made."""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            last = await self._context.guard(self._send_events(send))
        except ClientClosed:
            return  # nobody is there to be told
        finally:
            await self._stream.aclose()
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _send_events(self, send: Send) -> bytes:
        """Send all events but the last ones, which are returned."""
        try:
            # A client that reads nothing holds up a send for ever; what it has not read by then is given up.
            async with asyncio.timeout_at(self._stream.expires_at + _LAST_READ_S):
                return await self._send_all(send)
        except TimeoutError:
            raise ClientClosed("the client does not read") from None

    async def _send_all(self, send: Send) -> bytes:
        encode = self._encoder.event
        send = self._context.past_middleware(send)

        def write(deltas: list[TokenDelta]) -> Awaitable[None] | None:
            # A reader that lags gets several events in one write, and so catches up.
            frames = encode(deltas[0]) if len(deltas) == 1 else b"".join(map(encode, deltas))
            if not frames:
                return None
            return begun(send({"type": "http.response.body", "body": frames, "more_body": True}))

        try:
            await send({"type": "http.response.body", "body": self._encoder.opening(), "more_body": True})
            await self._stream.follow(write)
            return self._encoder.closing() + comment(f"server-timing {self._context.server_timing()}") + DONE
        except Exception as error:  # whatever broke, the client must not take the answer for complete
            return event(error_object(self._context.failed(error)))


def begun(work: Awaitable[None]) -> Awaitable[None] | None:
    """Run `work` up to where it first waits; returns None when it is done, else what is left of it, to be awaited."""
    steps = work.__await__()
    try:
        waits_for = next(steps)
    except StopIteration:
        return None
    return _rest(steps, waits_for)


@types.coroutine
def _rest(steps: Generator[Any, Any, None], waits_for: Any) -> Generator[Any, Any, None]:
    # `yield from` begins with a step of its own; this one has begun.
    try:
        while True:
            try:
                yield waits_for
            except BaseException as error:
                waits_for = steps.throw(error)
            else:
                waits_for = next(steps)
    except StopIteration:
        return
