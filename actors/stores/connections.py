"""redis-py connections that never lose a cancellation.

Used by `actors.stores.redis.connect` alone. redis-py bounds a write by `asyncio.wait_for`, and on Python 3.11
that swallows a cancellation that arrives in the very tick in which the write ends (cpython gh-86296, fixed in
3.12): the command then runs on as if nobody had left. Delete this module together with Python 3.11.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from redis.asyncio.connection import (
    AbstractConnection,
    BlockingConnectionPool,
    Connection,
    SSLConnection,
    UnixDomainSocketConnection,
)


class _KeepsCancellation(AbstractConnection):
    async def send_packed_command(
        self, command: bytes | str | Iterable[bytes], check_health: bool = True
    ) -> None:
        task = asyncio.current_task()
        # Not simply "is it being cancelled": a `finally` block of a cancelled task may still send commands.
        before = task.cancelling() if task else 0
        await super().send_packed_command(command, check_health)
        if task and task.cancelling() > before:
            await self.disconnect(nowait=True)  # its reply must not reach the next caller
            raise asyncio.CancelledError


class _Tcp(_KeepsCancellation, Connection):
    pass


class _Tls(_KeepsCancellation, SSLConnection):
    pass


class _Unix(_KeepsCancellation, UnixDomainSocketConnection):
    pass


_OURS: dict[type[AbstractConnection], type[AbstractConnection]] = {
    Connection: _Tcp,
    SSLConnection: _Tls,
    UnixDomainSocketConnection: _Unix,
}


def keep_cancellation(pool: BlockingConnectionPool) -> None:
    """Make the pool open such connections."""
    pool.connection_class = _OURS[pool.connection_class]
