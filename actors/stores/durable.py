"""Writes that count as accepted only once they are as safe as the configuration says.

Used by `actors.stores.jobs` for what an API acknowledges. The levels are described in `StorageConfig.durability`.
Redis answers after it has written its append-only file, so `appended` only has to make sure that there is one;
`fsynced` waits on the same connection, since WAITAOF is about the writes of the connection that asks.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from redis.asyncio import Redis

from actors.errors import Unavailable
from actors.stores.config import Durability

if TYPE_CHECKING:
    from redis.commands.core import AsyncScript

FSYNC_TIMEOUT_S = 3.0  # everysec: one second, and more on a busy disk
_CHECK_EVERY_S = 10.0


class DurableWrites:
    """Runs scripts that write.

    Args:
        redis: its time-out must be above `FSYNC_TIMEOUT_S` for level fsynced.
        level: what must have happened.
    """

    def __init__(self, redis: Redis, level: Durability) -> None:
        self._redis: Any = redis
        self._level = level
        self._checked_at = float("-inf")

    async def run(self, script: AsyncScript, keys: list[str], args: list[Any]) -> Any:
        """Run a script; returns once its writes are safe.

        Raises:
            Unavailable: they are not; the script may have run.
        """
        if self._level == "fsynced":
            return await self._fsynced(script, keys, args)
        if self._level == "appended":
            await self._check()
        return await script(keys=keys, args=args, client=self._redis)

    async def _fsynced(self, script: AsyncScript, keys: list[str], args: list[Any]) -> Any:
        async with self._redis.pipeline(transaction=False) as pipe:
            await script(keys=keys, args=args, client=pipe)
            pipe.execute_command("WAITAOF", 1, 0, round(FSYNC_TIMEOUT_S * 1e3 * 0.9))
            result, (local, _replicas) = await pipe.execute()
        if not local:
            raise Unavailable("storage did not reach its disk in time; it may or may not have been kept")
        return result

    async def _check(self) -> None:
        """Refuse while the server keeps no append-only file; asked again now and then."""
        if time.monotonic() - self._checked_at < _CHECK_EVERY_S:
            return
        found = await self._redis.info("persistence")
        if not found.get("aof_enabled"):
            raise Unavailable(
                "storage.durability is 'appended' and this Redis keeps no append-only file: set appendonly yes, or "
                "storage.durability: memory"
            )
        self._checked_at = time.monotonic()
