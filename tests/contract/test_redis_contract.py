"""Keys and limits over both Redis we test with: fakeredis with Lua, and a real Valkey; and what only that shows."""

import asyncio
import os
import signal
import time

import fakeredis
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actors.errors import AuthenticationFailed, RateLimited, StorageFull, Unavailable
from actors.policies import limits as policy
from actors.policies.limits import PERIOD_S, Limits
from actors.stores.keys import AuthenticatedKey, KeyStore
from actors.stores.limits import LimitStore
from actors.stores.redis import connect, script, translated
from actors.types import Principal


@pytest.fixture
async def real(valkey):
    async with connect(valkey.effective_redis_url) as client:
        await client.flushall()
        yield client


@pytest.fixture(params=["fakeredis", "valkey"])
async def redis(request, valkey):
    if request.param == "fakeredis":
        client = fakeredis.FakeAsyncRedis(socket_timeout=None)
    else:
        client = connect(valkey.effective_redis_url)
    async with client:
        await client.flushall()
        yield client


def key_with(limits=policy.UNLIMITED, tenant_limits=policy.UNLIMITED, key_id="k1", tenant="acme"):
    return AuthenticatedKey(
        principal=Principal(tenant=tenant, key_id=key_id), limits=limits, tenant_limits=tenant_limits
    )


# --- limits --------------------------------------------------------------------------------------------


async def test_a_limit_is_refused_past_its_burst_with_the_time_to_wait_and_the_headers(redis):
    store = LimitStore(redis)
    key = key_with(Limits(requests_per_minute=3, tokens_per_minute=1000))
    for left in (2, 1, 0):
        reservation = await store.reserve(key, 100)
        assert not reservation.local
        assert store.headers(reservation)["x-ratelimit-remaining-requests"] == str(left)
    with pytest.raises(RateLimited, match="3 requests per minute") as refused:
        await store.reserve(key, 100)
    headers = refused.value.headers
    assert 19.0 < refused.value.retry_after_s <= 20.0
    assert headers["x-ratelimit-limit-requests"] == "3"
    assert headers["x-ratelimit-remaining-requests"] == "0"
    assert headers["x-ratelimit-limit-tokens"] == "1000"
    assert 700 <= int(headers["x-ratelimit-remaining-tokens"]) <= 705, "a refusal takes no tokens"


async def test_a_refusal_of_one_limit_takes_nothing_from_the_others(redis):
    store = LimitStore(redis)
    key = key_with(Limits(requests_per_minute=10, tokens_per_minute=100))
    await store.reserve(key, 100)
    for _ in range(5):
        with pytest.raises(RateLimited, match="tokens per minute"):
            await store.reserve(key, 50)
    reservation = await store.reserve(key_with(Limits(requests_per_minute=10)), 50)
    assert store.headers(reservation)["x-ratelimit-remaining-requests"] == "8"


async def test_many_keys_do_not_get_past_the_limit_of_their_tenant(redis):
    store = LimitStore(redis)
    tenant_limits = Limits(requests_per_minute=5)
    keys = [key_with(Limits(requests_per_minute=5), tenant_limits, key_id=f"k{i}") for i in range(20)]
    outcomes = await asyncio.gather(*(store.reserve(key, 1) for key in keys), return_exceptions=True)
    assert sum(isinstance(outcome, RateLimited) for outcome in outcomes) == 15
    await store.reserve(key_with(tenant_limits=tenant_limits, tenant="other"), 1)


async def test_unused_tokens_are_given_back_and_missing_ones_charged(redis):
    store = LimitStore(redis)
    key = key_with(Limits(tokens_per_minute=1000))
    await store.settle(await store.reserve(key, 900), 100)
    second = await store.reserve(key, 500)
    assert 400 <= int(store.headers(second)["x-ratelimit-remaining-tokens"]) <= 405
    await store.settle(second, 900)
    with pytest.raises(RateLimited):
        await store.reserve(key, 50)


async def test_a_full_bucket_leaves_no_key_behind(redis):
    store = LimitStore(redis)
    await store.settle(await store.reserve(key_with(Limits(tokens_per_minute=1000)), 900), 0)
    assert await redis.keys("*") == []
    await store.reserve(key_with(Limits(requests_per_minute=60)), 1)
    [name] = await redis.keys("*")
    assert name == b"shoal:{acme}:limit:k1:requests"
    assert 0 < await redis.pttl(name) <= 1002


async def test_two_gateways_share_one_limit(redis):
    stores = [LimitStore(redis), LimitStore(redis)]
    key = key_with(Limits(requests_per_minute=10))
    outcomes = await asyncio.gather(
        *(stores[i % 2].reserve(key, 1) for i in range(30)), return_exceptions=True
    )
    assert sum(not isinstance(outcome, Exception) for outcome in outcomes) == 10


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    limit=st.integers(1, 1_000_000),
    shares=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 2)), min_size=1, max_size=12),
)
def test_the_scripts_and_the_policy_decide_alike(valkey, limit, shares):
    """Fractions of the limit are reserved and settled; every reply of the script is what the policy says."""

    async def both() -> None:
        async with connect(valkey.effective_redis_url) as redis:
            await redis.flushall()
            reserve, settle = script(redis, "limits_reserve"), script(redis, "limits_settle")
            tat_s = 0.0
            for share_of_limit, share_used in shares:
                cost = max(1, int(limit * share_of_limit))
                before_s = await server_time_s(redis)
                refused, wait_us, remaining, reset_us = await reserve(
                    keys=["k"], args=[60_000_000, limit, cost]
                )
                slack_s = await server_time_s(redis) - before_s + 1e-4
                verdict = policy.take(tat_s, before_s, limit, cost)
                if abs(verdict.wait_s) > slack_s or verdict.granted == (refused == 0):
                    assert verdict.granted == (refused == 0)
                    assert wait_us / 1e6 == pytest.approx(verdict.wait_s, abs=slack_s)
                    assert remaining == pytest.approx(verdict.remaining, abs=slack_s * limit / PERIOD_S + 1)
                    assert reset_us / 1e6 == pytest.approx(verdict.reset_s, abs=slack_s)
                if refused == 0:
                    await settle(keys=["k"], args=[60_000_000, limit, int(cost * share_used) - cost])
                tat_s = float(await redis.get("k") or 0) / 1e6
                if refused == 0:
                    expected_s = policy.settle(verdict.tat_s, before_s, limit, int(cost * share_used) - cost)
                    assert max(tat_s, before_s) == pytest.approx(expected_s, abs=slack_s + 1e-3)

    asyncio.run(both())


async def server_time_s(redis):
    seconds, micros = await redis.time()
    return seconds + micros / 1e6


# --- keys ----------------------------------------------------------------------------------------------


async def test_a_key_lives_from_creation_to_revocation(redis):
    keys, other = KeyStore(redis, b"p" * 32), KeyStore(redis, b"p" * 32)
    text, record = await keys.create("acme", limits=Limits(requests_per_minute=9), expires_in_s=60)
    assert (await other.authenticate(f"Bearer {text}")).limits.requests_per_minute == 9
    assert await keys.list("acme") == [record]
    await asyncio.sleep(0.1)  # the other's listener subscribes
    await keys.revoke(record.id)
    await asyncio.sleep(0.1)
    for store in (keys, other):
        with pytest.raises(AuthenticationFailed, match="revoked"):
            await store.authenticate(f"Bearer {text}")
        await store.aclose()


# --- only a real server shows ---------------------------------------------------------------------------


async def test_a_cancelled_command_never_answers_the_next_caller(real):
    """1,000 commands cancelled at every stage of their flight; each later reply is of its own request."""
    await asyncio.gather(*(real.set(f"k{i}", f"v{i}") for i in range(50)))
    for i in range(1000):
        command = asyncio.create_task(real.get(f"k{i % 50}"))
        await pause(1 + i % 15)
        command.cancel()
        outcome = await asyncio.gather(command, return_exceptions=True)
        assert isinstance(outcome[0], asyncio.CancelledError) or outcome[0] == f"v{i % 50}".encode()
        if i % 10 == 0:
            names = [(i + j) % 50 for j in range(5)]
            assert await asyncio.gather(*(real.get(f"k{n}") for n in names)) == [
                f"v{n}".encode() for n in names
            ]
    assert not real.connection_pool._in_use_connections, "no connection is lost to the pool"


async def pause(steps: int) -> None:
    for _ in range(steps):
        await asyncio.sleep(0)


async def test_a_cancellation_is_never_swallowed(real):
    """Python 3.11's wait_for would swallow those that meet the end of the write."""
    await real.ping()
    for steps in range(12):
        left = asyncio.Event()

        async def client(left: asyncio.Event = left) -> None:
            await real.get("k")
            left.set()
            await asyncio.sleep(30)

        task = asyncio.create_task(client())
        await pause(steps)
        task.cancel()
        await asyncio.wait([task], timeout=1)
        assert task.cancelled(), (
            f"lost when it came after {steps} steps; the command went on: {left.is_set()}"
        )


async def test_a_command_in_the_cleanup_of_a_cancelled_task_still_runs(real):
    async def client() -> None:
        try:
            await asyncio.sleep(30)
        finally:
            await real.set("settled", "yes")

    task = asyncio.create_task(client())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task], timeout=1)
    assert await real.get("settled") == b"yes"


async def test_a_full_server_refuses_writes_by_name_and_still_reads_and_limits(real):
    await real.set("kept", "1")
    await real.config_set("maxmemory", "1mb")
    try:
        with pytest.raises(StorageFull):
            async with translated("jobs"):
                await real.set("more", "x")
        with pytest.raises(StorageFull):
            async with translated("limits"):
                await script(real, "limits_settle")(keys=["k"], args=[60_000_000, 10, 5])
        assert await real.get("kept") == b"1"
        assert (await LimitStore(real).reserve(key_with(Limits(requests_per_minute=1)), 1)).local
    finally:
        await real.config_set("maxmemory", "32mb")


async def test_scripts_are_loaded_again_by_a_server_that_forgot_them(real):
    store = LimitStore(real)
    key = key_with(Limits(requests_per_minute=10))
    await store.reserve(key, 1)
    await real.script_flush()
    assert not (await store.reserve(key, 1)).local


async def test_replies_have_one_shape_on_every_server(real):
    await real.xadd("s", {"a": b"\x00\xff"})
    await real.xgroup_create("s", "g", id="0")
    [[name, [[_, fields]]]] = await real.xreadgroup("g", "c", {"s": ">"})
    assert name == b"s"
    assert fields == {b"a": b"\x00\xff"}


async def test_a_server_that_hangs_is_refused_within_its_time_out_and_then_at_once(valkey):
    async with connect(valkey.effective_redis_url) as redis:
        pid = (await redis.info("server"))["process_id"]
        store, keys = LimitStore(redis), KeyStore(redis, b"p" * 32)
        key = key_with(Limits(requests_per_minute=1000))
        text, _ = await keys.create("acme")
        os.kill(pid, signal.SIGSTOP)
        try:
            took_s = [await refusal_s(keys, text) for _ in range(5)]
            started = time.perf_counter()
            assert (await store.reserve(key, 1)).local
            took_s.append(time.perf_counter() - started)
        finally:
            os.kill(pid, signal.SIGCONT)
        assert max(took_s) < 0.4, "a time-out of 0.25 s, and the load of the machine"
        assert sorted(took_s)[2] < 0.05, "the outage is remembered"
        await asyncio.sleep(0.6)
        assert not (await store.reserve(key, 1)).local
        await keys.authenticate(f"Bearer {text}")
        await keys.aclose()


async def test_a_gateway_hears_of_revocations_again_after_the_server_was_killed(valkey):
    async with connect(valkey.effective_redis_url) as redis:
        keys, other = KeyStore(redis, b"p" * 32), KeyStore(redis, b"p" * 32)
        text, record = await keys.create("acme")
        await other.authenticate(f"Bearer {text}")
        await asyncio.sleep(0.1)
        os.kill((await redis.info("server"))["process_id"], signal.SIGKILL)
        await asyncio.sleep(0.05)
        await other.authenticate(f"Bearer {text}")
        await asyncio.sleep(2.0)  # the server is restarted, and the listener comes back after a second
        await keys.revoke(record.id)
        await asyncio.sleep(0.1)
        with pytest.raises(AuthenticationFailed, match="revoked"):
            await other.authenticate(f"Bearer {text}")
        await other.aclose()
        await keys.aclose()


async def refusal_s(keys, text):
    started = time.perf_counter()
    with pytest.raises(Unavailable):
        await keys.authenticate(f"Bearer {text}")
    return time.perf_counter() - started
