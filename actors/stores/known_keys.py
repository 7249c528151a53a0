"""The keys that this process knows: fresh ones, last-known-good ones, and which were revoked.

`KeyStore` asks it on every request and gives it the function that reads one key from Redis. It decides when
to read and what to use while Redis is down, and listens for revocations; it knows nothing of secrets.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

from redis.asyncio import Redis
from redis.exceptions import RedisError

from actors.errors import Unavailable
from actors.policies.limits import Limits
from actors.stores.redis import Outage
from actors.telemetry import logger
from actors.types import Principal

CHANNEL = "shoal:keys:revoked"  # ids, published at revocation

_MOST_KNOWN = 10_000
_WATCH_S = 5.0  # how often the listener looks up from waiting, so that redis-py may check the connection
_RECONNECT_S = 1.0

_log = logger("stores.keys")


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownKey:
    """A key as this process last read it; times are of the local monotonic clock."""

    principal: Principal
    limits: Limits
    tenant_limits: Limits
    digest: str
    revoked: bool
    expires_s: float
    read_s: float


class KnownKeys:
    """A bounded cache of keys that outlives an outage of Redis.

    Args:
        redis: for the channel of revocations.
        read: reads one key; None where there is none.
        fresh_s: how long a key is used without reading it again.
        stale_s: how long it is used while it cannot be read.
        now: local monotonic clock in seconds.
    """

    def __init__(
        self,
        redis: Redis,
        read: Callable[[str], Awaitable[KnownKey | None]],
        *,
        fresh_s: float,
        stale_s: float,
        now: Callable[[], float],
    ) -> None:
        self._redis = redis
        self._read = read
        self._fresh_s = fresh_s
        self._stale_s = stale_s
        self._now = now
        self._known: OrderedDict[str, KnownKey] = OrderedDict()  # least recently used first
        self._revoked: OrderedDict[str, None] = OrderedDict()
        self._trusted_since_s = float("-inf")  # what was read before this is read again first
        self._outage = Outage(now=now)
        self._listener: asyncio.Task[None] | None = None

    async def get(self, key_id: str) -> KnownKey | None:
        """The key, read from Redis where it is not fresh; None where there is none.

        Raises:
            Unavailable: Redis is down, and the key is not known here or was last read too long ago.
        """
        self._ensure_listening()
        known = self._known.get(key_id)
        if known is not None and self._is_fresh(known):
            self._known.move_to_end(key_id)
            return known
        try:
            read = await self._read_unless_down(key_id)
        except Unavailable:
            if known is None or not self._is_usable(known):
                raise
            return known
        if read is None:
            return self._lost(key_id, known)
        self._known[key_id] = read
        if len(self._known) > _MOST_KNOWN:
            self._known.popitem(last=False)
        return read

    def is_revoked(self, key_id: str) -> bool:
        """Whether a revocation was heard since this process started."""
        return key_id in self._revoked

    def revoke(self, key_id: str) -> None:
        """Note a revocation; it is never taken back."""
        self._revoked[key_id] = None
        if len(self._revoked) > _MOST_KNOWN:
            self._revoked.popitem(last=False)

    async def aclose(self) -> None:
        """Stop listening."""
        if self._listener is not None:
            self._listener.cancel()
            with suppress(asyncio.CancelledError):
                await self._listener
            self._listener = None

    def _is_fresh(self, known: KnownKey) -> bool:
        return known.read_s >= self._trusted_since_s and self._now() - known.read_s < self._fresh_s

    def _is_usable(self, known: KnownKey) -> bool:
        return self._now() - known.read_s < self._stale_s

    async def _read_unless_down(self, key_id: str) -> KnownKey | None:
        if self._outage.active:
            raise Unavailable("keys cannot be checked just now", retry_after_s=1.0)
        try:
            return await self._read(key_id)
        except Unavailable:
            self._outage.begin()
            raise

    def _lost(self, key_id: str, known: KnownKey | None) -> KnownKey | None:
        # Revoking is a mark and deletes nothing, so the server lost its data: those we know are served on.
        if known is None or not self._is_usable(known):
            return None
        _log.error("key_record_lost", key_id=key_id)
        return known

    def _ensure_listening(self) -> None:
        if self._listener is None or self._listener.done():
            self._listener = asyncio.create_task(self._listen(), name="key-revocations")

    async def _listen(self) -> None:
        while True:
            try:
                await self._listen_once()
            except (RedisError, OSError) as error:
                _log.warning("revocations_unheard", error=type(error).__name__)
            await asyncio.sleep(_RECONNECT_S)

    async def _listen_once(self) -> None:
        async with self._redis.pubsub(ignore_subscribe_messages=True) as channel:
            await channel.subscribe(CHANNEL)
            self._trusted_since_s = self._now()  # until now revocations may have been missed
            while True:
                message = await channel.get_message(timeout=_WATCH_S)
                if message is not None:
                    self.revoke(message["data"].decode())
