"""What one HTTP request carries along: its id, its clock, and whether its client is still there.

The middleware makes one `RequestContext` per request; routes get it by `app.api.deps`.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.types import Receive, Send

from actors.errors import ClientClosed, ShoalError
from actors.telemetry import StageClock, logger

log = logger("api")

T = TypeVar("T")


@dataclass(kw_only=True, slots=True)
class RequestContext:
    """State of one request, from its arrival to the end of its answer."""

    request_id: str  # x-request-id
    receive: Receive  # counts the body, then waits for the client to leave
    clock: StageClock = field(default_factory=StageClock)
    model: str = ""  # label of the metrics; set once the model is known to exist
    failure: ShoalError | None = None  # after the answer began, when its status was out already
    client_left: bool = False
    send: Send | None = None  # the server's own; five wrappers around it cost as much as an event of its own
    _departure: asyncio.Task[None] | None = None

    def server_timing(self) -> str:
        """The stages up to now, as the header has them."""
        return self.clock.server_timing()

    def failed(self, error: Exception) -> ShoalError:
        """Note a failure after the answer began; returns what the caller may know of it."""
        if not isinstance(error, ShoalError):
            log_unexpected(error)
            error = ShoalError("internal error")
        self.failure = error
        return error

    def note(self, action: str, error: ShoalError) -> None:
        """Log what went wrong beside an answer that is good all the same."""
        log.warning(action, error=error.message)

    def past_middleware(self, send: Send) -> Send:
        """What sends the rest of an answer whose head is out."""
        return self.send or send

    async def guard(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` until it ends or the client leaves.

        The body must have been read: after it, the server has only the departure to tell.

        Raises:
            ClientClosed: the client left first; `work` was cancelled and has ended.
        """
        task = asyncio.ensure_future(work)
        if self._departure is None:
            self._departure = asyncio.ensure_future(self._wait_for_departure())
        try:
            await asyncio.wait((task, self._departure), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:  # Serve cancels the request when its client leaves
            await abandon(task)
            raise
        if task.done():
            return task.result()
        self.client_left = True
        await abandon(task)
        raise ClientClosed("the client closed the connection")

    async def _wait_for_departure(self) -> None:
        try:
            while (await self.receive())["type"] != "http.disconnect":
                pass
        except Exception as error:  # a server that cannot tell has lost the connection
            log.info("connection_lost", error=type(error).__name__)

    def close(self) -> None:
        """End the watch."""
        if self._departure is not None:
            self._departure.cancel()


async def abandon(task: asyncio.Task[Any]) -> None:
    """Cancel `task`, wait for its end, and close what it may have opened before the cancellation reached it."""
    task.cancel()
    await asyncio.wait((task,))
    if not task.cancelled() and task.exception() is None and hasattr(task.result(), "aclose"):
        await task.result().aclose()


def log_unexpected(error: Exception) -> None:
    """Log a bug: its type and where it came from. Its message may quote a prompt and stays out."""
    frames = traceback.extract_tb(error.__traceback__)[-12:]
    log.error(
        "unexpected_error",
        error=type(error).__name__,
        where=[f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames],
    )
