"""What is published in Redis, given to all who listen in this process, over one connection.

A reader of a stream that grows elsewhere would hold a blocked connection each; a gateway with a thousand readers
holds one. A notice may be lost (a lost connection, a slow listener): it only says early what can be read anyway, so
listeners look for themselves when they hear nothing for a while. Used by `actors.stores.response_log`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import RedisError

from actors.telemetry import logger

_RECONNECT_S = 0.5
_WATCH_S = 5.0  # one read of the connection; nothing depends on it
_CANCEL_AGAIN_S = 0.5
_ALWAYS = "shoal:notices"  # nothing is published there: redis-py cannot read without a subscription
_UNREAD = 256  # notices that wait for one slow listener; then it has to look for itself
_log = logger("stores.notices")


class Inbox:
    """What one listener has not read."""

    def __init__(self) -> None:
        self._unread: asyncio.Queue[bytes] = asyncio.Queue(_UNREAD)

    def put(self, notice: bytes) -> None:
        """Take a notice; it is lost when too many wait."""
        with suppress(asyncio.QueueFull):
            self._unread.put_nowait(notice)

    async def get(self, timeout_s: float) -> bytes | None:
        """The next notice; None when none came in time."""
        if not self._unread.empty():
            return self._unread.get_nowait()
        try:
            async with asyncio.timeout(timeout_s):
                return await self._unread.get()
        except TimeoutError:
            return None

    def ready(self) -> list[bytes]:
        """All that have come, without waiting."""
        return [self._unread.get_nowait() for _ in range(self._unread.qsize())]


class Notices:
    """One subscription connection for a whole process.

    Args:
        redis: of `actors.stores.redis.connect`; stays its owner's to close.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._inboxes: dict[str, set[Inbox]] = {}
        self._subscription: PubSub | None = None
        self._listener: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def listen(self, channel: str) -> AsyncIterator[Inbox]:
        """Hear one channel from now on. Read what there is after this has begun: then nothing is missed."""
        inbox = Inbox()
        inboxes = self._inboxes.setdefault(channel, set())
        inboxes.add(inbox)
        try:
            if self._listener is None or self._listener.done():
                self._listener = asyncio.create_task(self._listen(), name="notices")
            elif len(inboxes) == 1 and self._subscription is not None:
                with suppress(RedisError, OSError):  # the listener finds out and begins anew
                    await self._subscription.subscribe(channel)
            yield inbox
        finally:
            inboxes.discard(inbox)
            if (
                not inboxes
                and self._inboxes.pop(channel, None) is not None
                and self._subscription is not None
            ):
                with suppress(RedisError, OSError):
                    await self._subscription.unsubscribe(channel)

    async def aclose(self) -> None:
        """Stop listening."""
        listener, self._listener = self._listener, None
        while listener is not None and not listener.done():
            listener.cancel()  # again: redis-py waits in ways that lose a cancellation (cpython gh-86296)
            await asyncio.wait((listener,), timeout=_CANCEL_AGAIN_S)

    async def _listen(self) -> None:
        while True:
            try:
                await self._listen_once()
            except (RedisError, OSError) as error:
                _log.warning("notices_unheard", error=type(error).__name__)
            await asyncio.sleep(_RECONNECT_S)

    async def _listen_once(self) -> None:
        async with self._redis.pubsub(ignore_subscribe_messages=True) as subscription:
            await subscription.subscribe(_ALWAYS, *self._inboxes)
            self._subscription = subscription
            try:
                while True:
                    message = await subscription.get_message(timeout=_WATCH_S)
                    if message is not None:
                        for inbox in self._inboxes.get(message["channel"].decode(), ()):
                            inbox.put(message["data"])
            finally:
                self._subscription = None
