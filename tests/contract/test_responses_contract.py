"""Responses over both Redis we test with: one owner writes, everybody reads, whoever cancels wins."""

import asyncio
from dataclasses import replace

import fakeredis
import pytest

from actors.errors import Conflict, InvalidRequest, NotFound
from actors.policies.responses import KIND, Began, Ended, ResponseTask, Said
from actors.stores.job_records import LeaseLost
from actors.stores.jobs import JobLog, JobLogConfig
from actors.stores.notices import Notices
from actors.stores.response_log import ResponseLog
from actors.stores.responses import Responses, ResponsesConfig, StoredResponse
from actors.types import GenerationCall, GenerationRequest, Message, Principal, TokenDelta

LEASE_S = 0.3
STORED = StoredResponse(
    head=b"{}", items=b"[]", history=(Message(role="user", content="hi"),), background=True, mark="m"
)
DONE = Ended(status="completed", at=1)


@pytest.fixture
def jobs(redis):
    return JobLog(redis, JobLogConfig(lease_s=LEASE_S))


@pytest.fixture
async def responses(redis, jobs):
    made = Responses(redis, jobs, ResponsesConfig(keep_s=100))
    yield made
    await made.aclose()


@pytest.fixture
async def log(redis):
    notices = Notices(redis)
    yield ResponseLog(redis, notices)
    await notices.aclose()


def task(response_id, tenant="acme"):
    request = GenerationRequest(request_id=response_id, messages=STORED.history)
    call = GenerationCall(model="m", request=request)
    return ResponseTask(response_id=response_id, principal=Principal(tenant=tenant), call=call)


async def accepted(responses, **more):
    response_id, _ = await responses.accept(task(responses.new_id()), STORED, **more)
    return response_id


async def lease_one(jobs, consumer="a"):
    [lease] = (await jobs.lease(KIND, consumer, 1)).leases
    return lease


def said(text, token):
    return Said(TokenDelta(0, text, (token,)))


async def test_what_was_accepted_can_be_leased_and_looked_up(responses, jobs):
    response_id = await accepted(responses)
    assert await responses.get("acme", response_id) == STORED
    lease = await lease_one(jobs)
    assert f"resp_{lease.job_id}" == response_id
    assert await responses.facts("acme", response_id) == []


async def test_a_key_used_twice_is_one_response_and_one_job(responses, jobs):
    first = await accepted(responses, idempotency_key="k")
    assert await accepted(responses, idempotency_key="k") == first
    assert (await jobs.stats(KIND)).waiting == 1
    with pytest.raises(Conflict):
        await responses.accept(task(responses.new_id()), replace(STORED, mark="other"), "k")


async def test_facts_are_written_once_and_in_order_and_the_last_one_ends_the_job(responses, jobs, log, redis):
    response_id = await accepted(responses)
    lease = await lease_one(jobs)
    assert await log.append(lease, 0, [Began()]) == 1
    with pytest.raises(LeaseLost):
        await log.append(lease, 0, [said("twice", 1)])
    with pytest.raises(LeaseLost):
        await log.append(lease, 5, [said("a gap", 1)])
    assert await log.append(lease, 1, [said("a", 1), DONE], "done") == 3
    assert await responses.facts("acme", response_id) == [Began(), said("a", 1), DONE]
    assert (await jobs.get(KIND, "acme", lease.job_id)).state == "done"
    assert (await jobs.stats(KIND)).pending == 0
    with pytest.raises(LeaseLost):
        await log.append(lease, 3, [said("late", 2)])
    assert not await jobs.done(lease)
    keys = [key async for key in redis.scan_iter(match=f"*{lease.job_id}*")]
    assert len(keys) == 3
    assert all([0 < await redis.ttl(key) <= 100 for key in keys])


async def test_a_zombie_writes_nothing_once_another_has_the_job(responses, jobs, log):
    response_id = await accepted(responses)
    zombie = await lease_one(jobs, "zombie")
    await log.append(zombie, 0, [Began(), said("a", 1)])
    await asyncio.sleep(LEASE_S * 1.2)
    heir = await lease_one(jobs, "heir")
    with pytest.raises(LeaseLost):
        await log.append(zombie, 2, [said("b", 2)])
    with pytest.raises(LeaseLost):
        await log.append(zombie, 2, [DONE], "done")
    await log.append(heir, 2, [said("b", 2), DONE], "done")
    assert [*map(type, await responses.facts("acme", response_id))] == [Began, Said, Said, Ended]


async def test_a_write_whose_answer_was_lost_is_not_repeated(responses, jobs, log, monkeypatch):
    await accepted(responses)
    lease = await lease_one(jobs)
    real, failures = log._append, [2]

    async def lossy(**call):
        result = await real(**call)
        if failures[0]:
            failures[0] -= 1
            raise ConnectionResetError
        return result

    monkeypatch.setattr(log, "_append", lossy)
    assert await log.append(lease, 0, [Began()]) == 1
    failures[0] = 1
    assert await log.append(lease, 1, [DONE], "done") == 2
    assert await log.read("acme", lease.job_id) == [Began(), DONE]


async def test_a_response_is_cancelled_while_it_waits_and_nobody_gets_it(responses, jobs):
    response_id = await accepted(responses)
    await responses.cancel("acme", response_id, 7)
    assert await responses.facts("acme", response_id) == [Ended(status="cancelled", at=7)]
    assert (await jobs.lease(KIND, "a", 1)).leases == []
    assert (await jobs.stats(KIND)).pending == 0


async def test_a_response_is_cancelled_while_it_is_to_be_tried_again(responses, jobs):
    response_id = await accepted(responses)
    await jobs.retry(await lease_one(jobs), 0, "busy")
    await responses.cancel("acme", response_id, 7)
    assert (await jobs.lease(KIND, "a", 1)).leases == []


async def test_a_response_is_cancelled_while_it_runs_and_its_owner_can_write_nothing_more(
    responses, jobs, log
):
    response_id = await accepted(responses)
    lease = await lease_one(jobs)
    await log.append(lease, 0, [Began(), said("a", 1)])
    await responses.cancel("acme", response_id, 7)
    with pytest.raises(LeaseLost):
        await log.append(lease, 2, [said("b", 2)])
    assert not await jobs.heartbeat(lease)
    await responses.cancel("acme", response_id, 8)
    assert (await responses.facts("acme", response_id))[2:] == [Ended(status="cancelled", at=7)]


async def test_what_has_ended_is_not_cancelled(responses, jobs, log):
    response_id = await accepted(responses)
    await log.append(await lease_one(jobs), 0, [DONE], "done")
    await responses.cancel("acme", response_id, 7)
    assert await responses.facts("acme", response_id) == [DONE]


async def test_a_response_that_was_waited_for_is_stored_and_cannot_be_cancelled(responses):
    response_id = responses.new_id()
    await responses.store("acme", response_id, replace(STORED, background=False), [Began(), DONE])
    assert await responses.facts("acme", response_id) == [Began(), DONE]
    with pytest.raises(InvalidRequest, match="background"):
        await responses.cancel("acme", response_id, 1)
    await responses.delete("acme", response_id, 1)
    with pytest.raises(NotFound):
        await responses.get("acme", response_id)


async def test_a_running_response_that_is_deleted_is_gone_and_stays_so(responses, jobs, log, redis):
    response_id = await accepted(responses)
    lease = await lease_one(jobs)
    await responses.delete("acme", response_id, 1)
    with pytest.raises(LeaseLost):
        await log.append(lease, 1, [DONE], "done")
    assert not [key async for key in redis.scan_iter(match="*acme*")]


async def test_other_tenants_and_wrong_ids_find_nothing(responses):
    response_id = await accepted(responses)
    for tenant, wrong in (("other", response_id), ("acme", "resp_1"), ("acme", response_id[5:])):
        for call in (responses.get, responses.find, responses.facts):
            if tenant == "other" and call != responses.get:
                assert not await call(tenant, wrong)
            else:
                with pytest.raises(NotFound):
                    await call(tenant, wrong)
        with pytest.raises(NotFound):
            await responses.cancel(tenant, wrong, 1)
        with pytest.raises(NotFound):
            await responses.delete(tenant, wrong, 1)
    assert await responses.get("acme", response_id) == STORED


async def test_followers_get_everything_once_whenever_they_come(responses, jobs, log):
    response_id = await accepted(responses)

    async def follow():
        return [fact async for facts in responses.follow("acme", response_id) for fact in facts]

    early = [asyncio.ensure_future(follow()) for _ in range(3)]
    await asyncio.sleep(0.05)
    lease = await lease_one(jobs)
    written = [Began(), *(said(str(n), n) for n in range(40)), DONE]
    for at, fact in enumerate(written[:20]):
        await log.append(lease, at, [fact])
    late = asyncio.ensure_future(follow())
    for at, fact in enumerate(written[20:-1], start=20):
        await log.append(lease, at, [fact])
        await asyncio.sleep(0.002)
    await log.append(lease, 41, [DONE], "done")
    for one in await asyncio.wait_for(asyncio.gather(*early, late, follow()), 5):
        assert one == written


async def test_many_followers_hold_one_connection(responses, jobs, log, redis):
    ids = [await accepted(responses) for _ in range(10)]
    readers = [responses.follow("acme", ids[n % 10]) for n in range(200)]

    async def read(reader):
        return [fact async for facts in reader for fact in facts]

    reading = [asyncio.ensure_future(read(reader)) for reader in readers]
    await asyncio.sleep(0.3)
    if not isinstance(redis, fakeredis.FakeAsyncRedis):
        assert sum(int(one["sub"]) > 0 for one in await redis.client_list()) == 1
    for lease in (await jobs.lease(KIND, "a", 10)).leases:
        await log.append(lease, 0, [Began(), said("a", 1), DONE], "done")
    for found in await asyncio.wait_for(asyncio.gather(*reading), 20):
        assert found == [Began(), said("a", 1), DONE]


async def test_a_follower_that_hears_nothing_looks_for_itself(responses, jobs, log, monkeypatch):
    monkeypatch.setattr("actors.stores.response_log._LOOK_S", 0.05)
    monkeypatch.setattr("actors.stores.notices.Inbox.put", lambda _inbox, _notice: None)
    response_id = await accepted(responses)
    await log.append(await lease_one(jobs), 0, [Began(), DONE], "done")
    found = [fact async for facts in responses.follow("acme", response_id) for fact in facts]
    assert found == [Began(), DONE]


async def test_a_follower_of_a_deleted_response_is_told(responses, monkeypatch):
    monkeypatch.setattr("actors.stores.response_log._LOOK_S", 0.05)
    response_id = await accepted(responses)
    following = responses.follow("acme", response_id)
    assert await anext(following) == []
    await responses.delete("acme", response_id, 1)
    with pytest.raises(NotFound):
        async for _ in following:
            pass


async def test_a_claimed_key_belongs_to_one_response_and_one_body(responses):
    first, second = responses.new_id(), responses.new_id()
    assert await responses.claim("acme", "k", first, "m", 5) == first
    assert await responses.claim("acme", "k", second, "m", 5) == first
    assert await responses.claim("other", "k", second, "m", 5) == second
    with pytest.raises(Conflict):
        await responses.claim("acme", "k", second, "other body", 5)
    await responses.unclaim("acme", "k")
    assert await responses.claim("acme", "k", second, "other body", 5) == second
