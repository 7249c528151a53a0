"""The maths of limits, and the local share that stands in while Redis is down. No server here."""

import fakeredis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.errors import InvalidRequest, RateLimited
from actors.policies import limits as policy
from actors.policies.limits import PERIOD_S, BucketState, Limits
from actors.stores.keys import AuthenticatedKey
from actors.stores.limits import LimitStore
from actors.types import Principal


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
async def redis_down():
    server = fakeredis.FakeServer()
    server.connected = False
    async with fakeredis.FakeAsyncRedis(server=server) as redis:
        yield redis


def key_with(limits=policy.UNLIMITED, tenant_limits=policy.UNLIMITED, key_id="k1"):
    return AuthenticatedKey(
        principal=Principal(tenant="acme", key_id=key_id), limits=limits, tenant_limits=tenant_limits
    )


# --- the bucket ----------------------------------------------------------------------------------------


def test_a_full_bucket_grants_its_whole_limit_at_once_and_no_more():
    tat_s = 0.0
    for taken in range(10):
        verdict = policy.take(tat_s, 100.0, 10, 1)
        assert verdict.granted
        assert verdict.remaining == 9 - taken
        tat_s = verdict.tat_s
    verdict = policy.take(tat_s, 100.0, 10, 1)
    assert not verdict.granted
    assert verdict.wait_s == pytest.approx(6.0)


def test_a_refusal_takes_nothing():
    tat_s = policy.take(0.0, 100.0, 10, 10).tat_s
    refused = policy.take(tat_s, 100.0, 10, 1)
    assert refused.tat_s == tat_s


def test_waiting_exactly_the_told_time_is_enough():
    tat_s = policy.take(0.0, 100.0, 7, 7).tat_s
    wait_s = policy.take(tat_s, 100.0, 7, 3).wait_s
    assert policy.take(tat_s, 100.0 + wait_s, 7, 3).granted
    assert not policy.take(tat_s, 100.0 + wait_s - 0.01, 7, 3).granted


def test_giving_back_never_makes_more_than_a_full_bucket():
    assert policy.settle(0.0, 100.0, 10, -5) == 100.0


def test_a_clock_set_back_an_hour_costs_at_most_two_minutes():
    tat_s = policy.take(0.0, 5000.0, 10, 10).tat_s
    verdict = policy.take(tat_s, 5000.0 - 3600.0, 10, 1)
    assert not verdict.granted
    assert verdict.wait_s <= 2 * PERIOD_S


@given(
    limit=st.integers(1, 1_000),
    steps=st.lists(st.tuples(st.floats(0, 30), st.floats(0, 1), st.floats(0, 1.5)), min_size=1, max_size=60),
)
def test_net_use_never_passes_a_burst_plus_the_rate(limit, steps):
    """Reserve, then settle at what was used: whatever the order, use <= L * (1 + t / T) + one overshoot."""
    now_s, tat_s, used, overshoot = 0.0, 0.0, 0.0, 0.0
    for pause_s, share_of_limit, share_used in steps:
        now_s += pause_s
        cost = max(1, int(limit * share_of_limit))
        verdict = policy.take(tat_s, now_s, limit, cost)
        tat_s = verdict.tat_s
        if verdict.granted:
            spent = int(cost * share_used)
            tat_s = policy.settle(tat_s, now_s, limit, spent - cost)
            used += spent
            overshoot = max(overshoot, spent - cost)
        assert used <= limit * (1 + now_s / PERIOD_S) + overshoot + 1e-3


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (-3, "0s"), (0.0004, "1ms"), (0.02, "20ms"), (1, "1s"), (8.64, "8.64s"), (59.9995, "1m0s"),
     (360, "6m0s"), (61.5, "1m1.5s"), (3600, "1h0m0s"), (86399.9, "23h59m59.9s")],
)  # fmt: skip
def test_durations_are_written_as_openai_writes_them(seconds, text):
    assert policy.duration(seconds) == text


def test_headers_show_whichever_of_key_and_tenant_has_less_left():
    states = [
        BucketState(unit="requests", limit=100, remaining=50, reset_s=30.0),
        BucketState(unit="requests", limit=500, remaining=3, reset_s=59.0),
        BucketState(unit="tokens", limit=1000, remaining=0, reset_s=60.0),
    ]
    assert policy.headers(states) == {
        "x-ratelimit-limit-requests": "500",
        "x-ratelimit-remaining-requests": "3",
        "x-ratelimit-reset-requests": "59s",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "1m0s",
    }


@pytest.mark.parametrize("limits", [{"requests_per_minute": 0}, {"tokens_per_minute": -1}])
def test_a_limit_under_which_nothing_passes_is_refused_by_name(limits):
    with pytest.raises(InvalidRequest, match=next(iter(limits))):
        Limits(**limits)


# --- the store without Redis ---------------------------------------------------------------------------


async def test_unlimited_keys_never_touch_redis(redis_down):
    store = LimitStore(redis_down)
    reservation = await store.reserve(key_with(), 1_000_000)
    await store.settle(reservation, 5)
    assert store.headers(reservation) == {}
    assert not store._outage.active


async def test_without_redis_each_gateway_grants_its_share(redis_down, clock):
    store = LimitStore(redis_down, expected_gateways=2, now=clock)
    key = key_with(Limits(requests_per_minute=6))
    for _ in range(3):
        assert (await store.reserve(key, 1)).local
    with pytest.raises(RateLimited) as refused:
        await store.reserve(key, 1)
    assert refused.value.retry_after_s == pytest.approx(20.0)
    clock.now_s += 20.0
    await store.reserve(key, 1)


async def test_without_redis_a_request_above_the_share_still_passes_a_full_bucket(redis_down, clock):
    store = LimitStore(redis_down, expected_gateways=4, now=clock)
    key = key_with(Limits(tokens_per_minute=1000))
    await store.reserve(key, 900)
    with pytest.raises(RateLimited):
        await store.reserve(key, 900)


async def test_without_redis_unused_tokens_are_given_back(redis_down, clock):
    store = LimitStore(redis_down, now=clock)
    key = key_with(Limits(tokens_per_minute=1000))
    first = await store.reserve(key, 1000)
    await store.settle(first, 100)
    await store.reserve(key, 900)
    with pytest.raises(RateLimited):
        await store.reserve(key, 1)


async def test_redis_is_asked_again_soon_after_a_failure(redis_down, clock):
    store = LimitStore(redis_down, now=clock)
    key = key_with(Limits(requests_per_minute=100))
    assert (await store.reserve(key, 1)).local
    redis_down.connection_pool.connection_kwargs["server"].connected = True
    assert (await store.reserve(key, 1)).local, "the outage is remembered for a moment"
    clock.now_s += 1.0
    assert not (await store.reserve(key, 1)).local


async def test_a_request_above_the_whole_limit_is_told_so_and_never_waits(redis_down):
    store = LimitStore(redis_down)
    with pytest.raises(InvalidRequest, match="5000 tokens and the limit of this tenant is 1000") as refused:
        await store.reserve(key_with(tenant_limits=Limits(tokens_per_minute=1000)), 5000)
    assert refused.value.retry_after_s is None
