"""API keys over an in-process Redis: what is stored, who is let in, and what holds while Redis is down."""

import asyncio
import stat

import fakeredis
import pytest

from actors.errors import AuthenticationFailed, InvalidRequest, NotFound, Unavailable
from actors.policies.limits import UNLIMITED, Limits
from actors.stores.config import StorageConfig
from actors.stores.keys import AuthConfig, KeyStore, open_key
from actors.stores.pepper import load_pepper
from actors.types import PriorityClass

PEPPER = b"p" * 32


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def server():
    return fakeredis.FakeServer()


@pytest.fixture
async def redis(server):
    async with fakeredis.FakeAsyncRedis(server=server, socket_timeout=None) as client:
        yield client


@pytest.fixture
async def keys(redis, clock):
    store = KeyStore(redis, PEPPER, now=clock)
    yield store
    await store.aclose()


@pytest.fixture
async def other_gateway(redis, clock):
    """A second process with the same Redis and pepper; its listener runs."""
    store = KeyStore(redis, PEPPER, now=clock)
    with pytest.raises(AuthenticationFailed):
        await store.authenticate(f"Bearer sk-{'0' * 16}-{'a' * 43}")
    await asyncio.sleep(0.05)
    yield store
    await store.aclose()


def bearer(key: str) -> str:
    return f"Bearer {key}"


# --- what a key is -------------------------------------------------------------------------------------


async def test_a_key_carries_its_tenant_class_scopes_and_limits(keys):
    limits = Limits(requests_per_minute=60, tokens_per_minute=10_000)
    text, record = await keys.create(
        "acme", priority=PriorityClass.BATCH, scopes=("inference",), name="nightly", limits=limits
    )
    await keys.set_tenant_limits("acme", Limits(tokens_per_minute=50_000))
    found = await keys.authenticate(bearer(text))
    assert text.startswith(f"sk-{record.id}-")
    assert found.principal.tenant == "acme"
    assert found.principal.priority is PriorityClass.BATCH
    assert found.principal.scopes == ("inference",)
    assert found.principal.key_id == record.id
    assert found.limits == limits
    assert found.tenant_limits == Limits(tokens_per_minute=50_000)


async def test_nothing_in_redis_opens_a_door(keys, redis):
    text, _ = await keys.create("acme", name="canary")
    await keys.authenticate(bearer(text))
    secret = text.split("-", 2)[2]
    dump = []
    for name in await redis.keys("*"):
        kind = await redis.type(name)
        dump.append(await (redis.hgetall(name) if kind == b"hash" else redis.smembers(name)))
    assert secret not in str(dump)
    assert PEPPER.decode() not in str(dump)
    assert "canary" in str(dump), "the dump is of the right thing"


async def test_another_pepper_does_not_know_the_key(keys, redis):
    text, _ = await keys.create("acme")
    stranger = KeyStore(redis, b"q" * 32)
    with pytest.raises(AuthenticationFailed, match="incorrect"):
        await stranger.authenticate(bearer(text))
    await stranger.aclose()


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", "sk-0011223344556677-x", "Basic dXNlcg==", "Bearer sk-short-x",
     "Bearer " + "x" * 5000],
)  # fmt: skip
async def test_what_is_no_key_is_refused_without_asking_redis(keys, server, header):
    server.connected = False
    with pytest.raises(AuthenticationFailed, match="Authorization: Bearer"):
        await keys.authenticate(header)


async def test_an_unknown_id_and_a_wrong_secret_get_the_same_answer(keys):
    text, record = await keys.create("acme")
    answers = []
    for wrong in (f"sk-{record.id}-{'a' * 43}", f"sk-{'0' * 16}-{text.split('-', 2)[2]}"):
        with pytest.raises(AuthenticationFailed) as refused:
            await keys.authenticate(bearer(wrong))
        answers.append(refused.value.message)
    assert answers == ["incorrect API key"] * 2


async def test_the_scheme_is_read_in_any_case_and_keys_are_not(keys):
    text, _ = await keys.create("acme")
    await keys.authenticate(f"bearer {text}")
    with pytest.raises(AuthenticationFailed):
        await keys.authenticate(bearer(text.upper()))


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        ({"tenant": "a{b}"}, "tenant"),
        ({"tenant": ""}, "tenant"),
        ({"tenant": "a", "scopes": ("everything",)}, "scopes"),
        ({"tenant": "a", "scopes": ()}, "scopes"),
        ({"tenant": "a", "name": "x" * 129}, "name"),
        ({"tenant": "a", "name": "a\nb"}, "name"),
        ({"tenant": "a", "expires_in_s": 0}, "expires_in_s"),
    ],
)
async def test_a_key_that_may_not_be_made_is_refused_by_field(keys, arguments, param):
    with pytest.raises(InvalidRequest) as refused:
        await keys.create(**arguments)
    assert refused.value.param == param
    assert await keys.list() == []


async def test_keys_are_listed_by_tenant_oldest_first(keys):
    ids = [(await keys.create(tenant))[1].id for tenant in ("acme", "zeta", "acme")]
    assert {record.id for record in await keys.list("acme")} == {ids[0], ids[2]}
    assert {record.id for record in await keys.list()} == set(ids)
    assert await keys.list("nobody") == []


async def test_a_key_that_does_not_exist_is_named(keys):
    for call in (keys.get, keys.revoke):
        with pytest.raises(NotFound, match="f00"):
            await call("f00")


# --- the end of a key ----------------------------------------------------------------------------------


async def test_a_revoked_key_is_refused_at_once_and_stays_listed(keys):
    text, record = await keys.create("acme")
    await keys.authenticate(bearer(text))
    revoked = await keys.revoke(record.id)
    with pytest.raises(AuthenticationFailed, match="revoked"):
        await keys.authenticate(bearer(text))
    assert revoked.revoked_at is not None
    assert await keys.list("acme") == [revoked]
    assert await keys.revoke(record.id) == revoked, "again is no error and changes nothing"


async def test_other_gateways_hear_of_a_revocation_at_once(keys, other_gateway):
    text, record = await keys.create("acme")
    await other_gateway.authenticate(bearer(text))
    await keys.revoke(record.id)
    await asyncio.sleep(0.05)
    with pytest.raises(AuthenticationFailed, match="revoked"):
        await other_gateway.authenticate(bearer(text))


async def test_a_revocation_that_was_not_heard_is_read_within_30_seconds(keys, redis, clock):
    text, record = await keys.create("acme")
    await keys.authenticate(bearer(text))
    await redis.hset(f"shoal:key:{record.id}", "revoked_at", "1")
    clock.now_s += 30.0
    with pytest.raises(AuthenticationFailed, match="revoked"):
        await keys.authenticate(bearer(text))


async def test_a_revocation_holds_while_redis_is_down(keys, other_gateway, server, clock):
    text, record = await keys.create("acme")
    await other_gateway.authenticate(bearer(text))
    await keys.revoke(record.id)
    await asyncio.sleep(0.05)
    server.connected = False
    for pause_s in (0.0, 31.0, 600.0):
        clock.now_s += pause_s
        with pytest.raises(AuthenticationFailed, match="revoked"):
            await other_gateway.authenticate(bearer(text))


async def test_a_key_expires_by_the_servers_clock_also_while_redis_is_down(keys, server, clock):
    text, _ = await keys.create("acme", expires_in_s=100)
    await keys.authenticate(bearer(text))
    server.connected = False
    clock.now_s += 98.0
    await keys.authenticate(bearer(text))
    clock.now_s += 3.0
    with pytest.raises(AuthenticationFailed, match="expired"):
        await keys.authenticate(bearer(text))


# --- Redis is down -------------------------------------------------------------------------------------


async def test_known_keys_are_accepted_while_redis_is_down_up_to_a_limit(keys, server, clock):
    text, _ = await keys.create("acme")
    before = await keys.authenticate(bearer(text))
    server.connected = False
    clock.now_s += 3000.0
    assert await keys.authenticate(bearer(text)) == before
    clock.now_s += 601.0
    with pytest.raises(Unavailable):
        await keys.authenticate(bearer(text))


async def test_unknown_keys_are_never_accepted_while_redis_is_down(keys, server):
    text, _ = await keys.create("acme")
    server.connected = False
    for _ in range(2):
        with pytest.raises(Unavailable) as refused:
            await keys.authenticate(bearer(text))
        assert refused.value.retry_after_s == 1.0


async def test_a_wrong_secret_of_a_known_key_is_refused_while_redis_is_down(keys, server, clock):
    text, record = await keys.create("acme")
    await keys.authenticate(bearer(text))
    server.connected = False
    clock.now_s += 60.0
    with pytest.raises(AuthenticationFailed, match="incorrect"):
        await keys.authenticate(bearer(f"sk-{record.id}-{'a' * 43}"))


async def test_unknown_keys_work_again_within_a_second_of_redis_return(keys, server, clock):
    text, _ = await keys.create("acme")
    server.connected = False
    with pytest.raises(Unavailable):
        await keys.authenticate(bearer(text))
    server.connected = True
    clock.now_s += 1.0
    await keys.authenticate(bearer(text))


async def test_known_keys_outlive_an_emptied_redis(keys, redis, clock):
    text, _ = await keys.create("acme")
    await keys.authenticate(bearer(text))
    await redis.flushall()
    clock.now_s += 60.0
    await keys.authenticate(bearer(text))
    clock.now_s += 3600.0
    with pytest.raises(AuthenticationFailed, match="incorrect"):
        await keys.authenticate(bearer(text))


async def test_administration_says_that_redis_is_down(keys, server):
    server.connected = False
    with pytest.raises(Unavailable, match="keys cannot be reached"):
        await keys.create("acme")


# --- configuration and pepper --------------------------------------------------------------------------


def test_keys_are_the_default_and_open_mode_has_one_unlimited_tenant():
    assert AuthConfig().mode == "keys"
    caller = open_key(AuthConfig(mode="open", open_tenant="lab"))
    assert caller.principal.tenant == "lab"
    assert caller.limits == caller.tenant_limits == UNLIMITED


def test_keys_may_not_be_cached_past_the_promised_minute():
    with pytest.raises(ValueError, match="less than or equal to 30"):
        AuthConfig(cache_ttl_s=61)


def test_the_pepper_is_made_once_and_only_its_owner_reads_it(tmp_path):
    storage = StorageConfig(data_dir=tmp_path / "data")
    pepper = load_pepper(None, storage)
    path = tmp_path / "data" / "pepper"
    assert load_pepper(None, storage) == pepper
    assert len(pepper) >= 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_a_pepper_that_others_can_read_is_refused(tmp_path):
    storage = StorageConfig(data_dir=tmp_path)
    load_pepper(None, storage)
    (tmp_path / "pepper").chmod(0o644)
    with pytest.raises(ValueError, match="chmod 600"):
        load_pepper(None, storage)


def test_an_outside_redis_needs_a_shared_pepper(tmp_path):
    with pytest.raises(ValueError, match=r"auth\.pepper_file must be set"):
        load_pepper(None, StorageConfig(data_dir=tmp_path, redis_url="redis://somewhere"))


@pytest.mark.parametrize("content", [None, "short"])
def test_a_useless_pepper_file_is_named(tmp_path, content):
    path = tmp_path / "secret"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=r"auth\.pepper_file"):
        load_pepper(path, StorageConfig())
