"""The connection to Redis or Valkey: time-outs, scripts, and errors that are ours.

Every store in this package talks through `connect`, wraps its commands in `translated` and runs its Lua
through `script`. Which keys exist, and what they mean, is each store's own business.

Replies are **bytes** (`decode_responses=False`), since values are JSON or msgpack; commands take `str` or
`bytes`. The wire protocol is RESP2, so `xreadgroup` gives a list on every server. Nothing here retries:
retries are made at one layer only, and that is not this one.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

from redis import exceptions as redis_errors
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from actors.errors import StorageFull, Unavailable
from actors.stores.connections import keep_cancellation
from actors.telemetry import logger

if TYPE_CHECKING:
    from redis.commands.core import AsyncScript

TIMEOUT_S = 0.25  # a refusal must reach the caller within 250 ms of a dead Redis

_RETRY_AFTER_S = 1.0
_SCHEMES = ("redis://", "rediss://", "unix://")
_COMPLAIN_EVERY_S = 1.0
_IDLE_CHECK_S = 15  # a connection idle for longer is pinged before it is used

# The server is there and may not write or serve just now.
_NOT_SERVING = (
    redis_errors.ConnectionError,  # refused, reset, loading, wrong password, no free connection in the pool
    redis_errors.TimeoutError,
    redis_errors.ReadOnlyError,
    redis_errors.ClusterError,
    redis_errors.TryAgainError,
    OSError,
)
_FULL = ("OOM", "MISCONF")  # maxmemory reached; the AOF or snapshot cannot be written

_log = logger("stores.redis")


def connect(
    url: str, *, timeout_s: float = TIMEOUT_S, max_connections: int = 32, client_name: str = "shoal"
) -> Redis:
    """A client with a pool of its own; connections open at the first command.

    Args:
        url: redis://, rediss:// or unix:// as redis-py reads it. Options in its query string win.
        timeout_s: longest wait for each of a free connection, connecting, and a reply. A client that blocks
            on purpose (XREADGROUP BLOCK, WAITAOF) needs more than its block time: give it its own client.
        max_connections: of this process and client; further commands wait for a free one.
        client_name: shown by CLIENT LIST.

    Raises:
        ValueError: the URL is not one; the message never repeats it, since it may hold a password.
    """
    try:
        pool = _pool(url, timeout_s, max_connections, client_name)
    except ValueError:
        raise ValueError(
            "redis_url must be redis://[user:password@]host[:port][/db], rediss:// the same, or unix:///path, "
            "with special characters of the password written as %xx"
        ) from None
    keep_cancellation(pool)
    return Redis.from_pool(pool)


def _pool(url: str, timeout_s: float, max_connections: int, client_name: str) -> BlockingConnectionPool:
    if not url.startswith(_SCHEMES):  # redis-py takes redis:/host for localhost
        raise ValueError
    return BlockingConnectionPool.from_url(
        url,
        timeout=timeout_s,
        max_connections=max_connections,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        health_check_interval=_IDLE_CHECK_S,
        client_name=client_name,
        driver_info=None,  # two round trips less per connection
        protocol=2,
        retry=Retry(NoBackoff(), 0),
    )


@cache
def _source(name: str) -> str:
    return (resources.files("actors.stores") / "lua" / f"{name}.lua").read_text(encoding="utf-8")


def script(redis: Redis, name: str) -> AsyncScript:
    """The script `lua/<name>.lua`, run by its hash and loaded again where the server lost it.

    Call the result as `await run(keys=[...], args=[...])`.
    """
    return redis.register_script(_source(name))


@asynccontextmanager
async def translated(what: str = "storage") -> AsyncIterator[None]:
    """Turn redis-py's errors into ours; for `async with`, and as a decorator of a coroutine function.

    Args:
        what: the store's name for the message ("keys").

    Raises:
        Unavailable: the server is down, loading, too slow, or may not serve now.
        StorageFull: it has no memory or disk left to write; reads go on.
    """
    try:
        yield
    except redis_errors.ResponseError as error:
        if _is_full(error):
            _complain("storage_full", what, str(error))
            raise StorageFull(f"{what} has no room left to write", retry_after_s=_RETRY_AFTER_S) from None
        if isinstance(error, _NOT_SERVING):
            raise _unavailable(what, error) from None
        raise
    except _NOT_SERVING as error:
        raise _unavailable(what, error) from None


def _is_full(error: redis_errors.ResponseError) -> bool:
    # Inside a script the code may stand behind a prefix; redis-py strips a leading "OOM".
    return isinstance(error, redis_errors.OutOfMemoryError) or any(code in str(error) for code in _FULL)


def _unavailable(what: str, error: Exception) -> Unavailable:
    _complain("storage_unavailable", what, type(error).__name__)
    return Unavailable(f"{what} cannot be reached", retry_after_s=_RETRY_AFTER_S)


_complained_s: dict[tuple[str, str], float] = {}


def _complain(action: str, what: str, error: str) -> None:
    # Every request fails in an outage: one line a second says as much.
    now_s = time.monotonic()
    if now_s - _complained_s.get((action, what), float("-inf")) >= _COMPLAIN_EVERY_S:
        _complained_s[action, what] = now_s
        _log.warning(action, what=what, error=error)


class Outage:
    """Remembers that Redis just failed, so that not every caller waits out a time-out of its own.

    For stores with an answer that needs no Redis (keys, limits). After a failure `active` is true for
    `cooldown_s`; then calls try again.
    """

    def __init__(self, cooldown_s: float = 0.5, now: Callable[[], float] = time.monotonic) -> None:
        self._cooldown_s = cooldown_s
        self._now = now
        self._until = float("-inf")

    @property
    def active(self) -> bool:
        """Whether Redis failed less than `cooldown_s` ago."""
        return self._now() < self._until

    def begin(self) -> None:
        """Note a failure."""
        self._until = self._now() + self._cooldown_s
