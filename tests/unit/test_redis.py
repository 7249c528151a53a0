"""The connection helpers, without a server."""

import asyncio
import re
from importlib import resources

import fakeredis
import pytest
import structlog
from redis import exceptions as redis_errors

from actors.errors import StorageFull, Unavailable
from actors.stores.redis import Outage, connect, script, translated


@pytest.mark.parametrize(
    "error",
    [
        redis_errors.ConnectionError("Error 111 connecting to 10.1.2.3:6379"),
        redis_errors.TimeoutError("Timeout reading from 10.1.2.3:6379"),
        redis_errors.BusyLoadingError("loading"),
        redis_errors.MaxConnectionsError("Too many connections"),
        redis_errors.AuthenticationError("invalid username-password pair"),
        redis_errors.ReadOnlyError("You can't write against a read only replica."),
        redis_errors.ClusterDownError("The cluster is down"),
        ConnectionResetError(104, "Connection reset by peer"),
    ],
)
async def test_a_server_that_cannot_serve_is_unavailable_and_its_address_stays_inside(error):
    with pytest.raises(Unavailable) as seen:
        async with translated("keys"):
            raise error
    assert seen.value.message == "keys cannot be reached"
    assert seen.value.retry_after_s == 1.0
    assert seen.value.__suppress_context__, "no traceback with an address reaches a log by chaining"


@pytest.mark.parametrize(
    "error",
    [
        redis_errors.OutOfMemoryError("command not allowed when used memory > 'maxmemory'."),
        redis_errors.ResponseError("MISCONF Errors writing to the AOF file: No space left on device"),
        redis_errors.ResponseError("OOM command not allowed when used memory > 'maxmemory'. script: 0a1b"),
    ],
)
async def test_a_server_without_room_is_storage_full(error):
    with pytest.raises(StorageFull):
        async with translated("jobs"):
            raise error


async def test_an_outage_is_logged_once_a_second_and_not_once_a_request():
    with structlog.testing.capture_logs() as lines:
        for _ in range(100):
            with pytest.raises(Unavailable):
                async with translated("a store of this test"):
                    raise redis_errors.ConnectionError("10.1.2.3")
    assert len(lines) == 1
    assert "10.1.2.3" not in str(lines)


async def test_a_mistake_of_ours_is_not_hidden_as_an_outage():
    with pytest.raises(redis_errors.ResponseError, match="WRONGTYPE"):
        async with translated():
            raise redis_errors.ResponseError("WRONGTYPE Operation against a key")


async def test_a_cancelled_command_stays_cancelled():
    with pytest.raises(asyncio.CancelledError):
        async with translated():
            raise asyncio.CancelledError


async def test_it_decorates_coroutine_functions_any_number_of_times():
    @translated("jobs")
    async def fails() -> None:
        raise redis_errors.ConnectionError

    for _ in range(2):
        with pytest.raises(Unavailable, match="jobs"):
            await fails()


@pytest.mark.parametrize(
    "url",
    ["", "localhost:6379", "http://:hunter2@host", "redis:/x", "redis://u:hunter2/x@host", "redis://h:http"],
)
def test_a_url_that_is_none_is_refused_without_repeating_it(url):
    with pytest.raises(ValueError, match="redis_url must be redis://") as refused:
        connect(url)
    assert "hunter2" not in str(refused.value)


async def test_nothing_is_retried_here():
    async with connect("redis://127.0.0.1:1") as redis:
        assert redis.connection_pool.make_connection().retry.get_retries() == 0
        with pytest.raises(redis_errors.ConnectionError):
            await redis.ping()


async def test_scripts_come_from_the_package_and_survive_a_server_that_forgot_them():
    async with fakeredis.FakeAsyncRedis() as redis:
        run = script(redis, "limits_settle")
        for _ in range(2):
            await run(keys=["shoal:{t}:limit:k:tokens"], args=[60_000_000, 10, 5])
            await redis.script_flush()


def test_every_script_opens_with_its_key_schema():
    folder = resources.files("actors.stores") / "lua"
    sources = {file.name: file.read_text() for file in folder.iterdir() if file.name.endswith(".lua")}
    assert "limits_reserve.lua" in sources
    for name, source in sources.items():
        heading = re.match(r"(--.*\n)+", source)
        assert heading is not None, name
        assert "KEYS[" in heading[0], name


def test_an_outage_is_remembered_for_its_cooldown():
    now_s = [10.0]
    outage = Outage(cooldown_s=0.5, now=lambda: now_s[0])
    assert not outage.active
    outage.begin()
    assert outage.active
    now_s[0] += 0.5
    assert not outage.active
