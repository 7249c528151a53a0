"""The job log over both Redis we test with: leases, heartbeats, retries, deaths, fences, an emptied server."""

import asyncio
from dataclasses import replace

import pytest

from actors.errors import NotFound
from actors.stores.jobs import JobLog, JobLogConfig

KIND = "ingestion"
LEASE_S = 0.3


@pytest.fixture
def jobs(redis):
    return JobLog(redis, JobLogConfig(lease_s=LEASE_S))


async def lease_one(jobs, consumer="a"):
    found = await jobs.lease(KIND, consumer, 1)
    return found.leases[0]


async def test_a_job_is_leased_once_and_done_for_good(jobs):
    job_id = await jobs.enqueue(KIND, "acme", {"n": 1})
    lease = await lease_one(jobs)
    assert (lease.job_id, lease.tenant, lease.payload, lease.attempts) == (job_id, "acme", {"n": 1}, 1)
    assert (await jobs.lease(KIND, "b", 5)).leases == []
    assert await jobs.done(lease)
    assert (await jobs.get(KIND, "acme", job_id)).state == "done"
    await asyncio.sleep(LEASE_S * 1.5)
    assert (await jobs.lease(KIND, "b", 5)).leases == []
    assert (await jobs.stats(KIND)).pending == 0


async def test_jobs_come_in_the_order_in_which_they_were_written(jobs):
    ids = [await jobs.enqueue(KIND, "acme", {"n": n}) for n in range(5)]
    found = await jobs.lease(KIND, "a", 3)
    assert [lease.job_id for lease in found.leases] == ids[:3]


async def test_a_job_written_before_any_runner_came_is_found(jobs):
    await jobs.enqueue(KIND, "acme", {})
    assert len((await JobLog(jobs._redis).lease(KIND, "late", 1)).leases) == 1


async def test_a_dead_runners_job_goes_to_another_and_its_death_is_counted(jobs):
    await jobs.enqueue(KIND, "acme", {})
    first = await lease_one(jobs, "dying")
    await asyncio.sleep(LEASE_S * 1.2)
    second = await lease_one(jobs, "heir")
    assert (second.job_id, second.deaths, second.attempts) == (first.job_id, 1, 2)
    assert not await jobs.heartbeat(first)
    assert not await jobs.done(first), "the zombie's answer must not count"
    assert not await jobs.retry(first, 0, "late")
    assert await jobs.done(second)


async def test_a_runner_that_died_before_it_took_the_job_does_not_count_against_it(jobs, redis):
    await jobs.lease(KIND, "x", 1)  # makes the group
    await jobs.enqueue(KIND, "acme", {})
    await redis.xreadgroup("runners", "dying", {f"shoal:{{jobs:{KIND}}}:stream": ">"}, count=1)
    await asyncio.sleep(LEASE_S * 1.2)
    lease = await lease_one(jobs, "heir")
    assert (lease.deaths, lease.attempts) == (0, 1)


async def test_heartbeats_keep_a_long_job_whatever_time_passes(jobs):
    await jobs.enqueue(KIND, "acme", {})
    lease = await lease_one(jobs)
    for _ in range(6):
        await asyncio.sleep(LEASE_S / 3)
        assert await jobs.heartbeat(lease)
        assert (await jobs.lease(KIND, "b", 1)).leases == []
    assert await jobs.done(lease)


async def test_a_stale_job_is_found_behind_many_that_are_alive(jobs):
    for n in range(30):
        await jobs.enqueue(KIND, "acme", {"n": n})
    alive = (await jobs.lease(KIND, "alive", 29)).leases
    await jobs.lease(KIND, "dead", 1)
    await asyncio.sleep(LEASE_S * 0.8)
    for lease in alive:
        await jobs.heartbeat(lease)
    await asyncio.sleep(LEASE_S * 0.5)
    assert [lease.payload for lease in (await jobs.lease(KIND, "heir", 1)).leases] == [{"n": 29}]


async def test_a_retried_job_waits_its_delay_and_counts_its_failures(jobs):
    await jobs.enqueue(KIND, "acme", {})
    assert await jobs.retry(await lease_one(jobs), 0.2, "index down")
    found = await jobs.lease(KIND, "a", 1)
    assert found.leases == []
    assert 0 < found.due_in_s <= 0.2
    assert (await jobs.stats(KIND)).delayed == 1
    await jobs.wait(KIND, found, 5)
    await asyncio.sleep(0.02)
    lease = await lease_one(jobs)
    assert (lease.failures, lease.unforeseen, lease.deaths, lease.attempts) == (1, 0, 0, 2)
    await jobs.retry(lease, 0, "bug", unforeseen=True)
    lease = await lease_one(jobs)
    assert (lease.failures, lease.unforeseen) == (2, 1)


async def test_a_job_given_up_is_readable_as_a_dead_letter(jobs):
    job_id = await jobs.enqueue(KIND, "acme", {"n": 1})
    assert await jobs.dead(await lease_one(jobs), "it kills its runner")
    letters = await jobs.dead_letters(KIND)
    assert [(job.job_id, job.state, job.error, job.payload) for job in letters] == [
        (job_id, "dead", "it kills its runner", {"n": 1})
    ]
    assert (await jobs.stats(KIND)).pending == 0


async def test_an_idempotency_key_gives_the_first_job_again_within_its_tenant(jobs):
    first = await jobs.enqueue(KIND, "acme", {"n": 1}, idempotency_key="k")
    assert await jobs.enqueue(KIND, "acme", {"n": 2}, idempotency_key="k") == first
    assert await jobs.enqueue(KIND, "other", {"n": 3}, idempotency_key="k") != first
    assert (await jobs.stats(KIND)).waiting == 2


async def test_jobs_of_one_serial_run_one_after_another(jobs):
    await jobs.enqueue(KIND, "acme", {"n": 1}, serial="vs:f")
    await jobs.enqueue(KIND, "acme", {"n": 2}, serial="vs:f")
    await jobs.enqueue(KIND, "other", {"n": 3}, serial="vs:f")
    found = (await jobs.lease(KIND, "a", 5)).leases
    assert [lease.payload["n"] for lease in found] == [1, 3]
    for _ in range(4):
        await asyncio.sleep(LEASE_S / 3)
        assert await jobs.heartbeat(found[0])
        assert await jobs.heartbeat(found[1])
    assert (await jobs.lease(KIND, "b", 5)).leases == []
    for lease in found:
        await jobs.done(lease)
    await asyncio.sleep(0.3)
    assert [lease.payload["n"] for lease in (await jobs.lease(KIND, "b", 5)).leases] == [2]


async def test_a_dead_runners_serial_is_free_again_with_its_lease(jobs):
    await jobs.enqueue(KIND, "acme", {"n": 1}, serial="s")
    await lease_one(jobs, "dying")
    await asyncio.sleep(LEASE_S * 1.2)
    assert (await lease_one(jobs, "heir")).payload == {"n": 1}


async def test_an_emptied_server_is_worked_with_again(jobs, redis):
    await jobs.enqueue(KIND, "acme", {"n": 1})
    lease = await lease_one(jobs)
    await redis.flushall()
    assert (await jobs.stats(KIND)).pending == 0
    assert not await jobs.heartbeat(lease)
    assert not await jobs.done(lease)
    assert (await jobs.lease(KIND, "a", 1)).leases == []
    await jobs.enqueue(KIND, "acme", {"n": 2})
    assert (await lease_one(jobs)).payload == {"n": 2}


async def test_waiting_ends_with_the_next_job(jobs):
    found = await jobs.lease(KIND, "a", 1)
    waiting = asyncio.ensure_future(jobs.wait(KIND, found, 5))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await jobs.enqueue(KIND, "acme", {})
    await asyncio.wait_for(waiting, 1)


async def test_a_job_written_between_lease_and_wait_is_not_slept_through(jobs):
    found = await jobs.lease(KIND, "a", 1)
    await jobs.enqueue(KIND, "acme", {})
    await asyncio.wait_for(jobs.wait(KIND, found, 5), 1)


async def test_stats_tell_the_age_of_the_oldest_that_nobody_has(jobs):
    await jobs.enqueue(KIND, "acme", {})
    await asyncio.sleep(0.25)
    await jobs.enqueue(KIND, "acme", {})
    stats = await jobs.stats(KIND)
    assert (stats.waiting, stats.leased, stats.pending) == (2, 0, 2)
    assert 0.2 < stats.oldest_age_s < 5
    await lease_one(jobs)
    after = await jobs.stats(KIND)
    assert (after.waiting, after.leased, after.pending) == (1, 1, 2)
    assert after.oldest_age_s < stats.oldest_age_s


async def test_another_tenants_job_does_not_exist(jobs):
    job_id = await jobs.enqueue(KIND, "acme", {})
    with pytest.raises(NotFound):
        await jobs.get(KIND, "other", job_id)


async def test_kinds_do_not_mix(jobs):
    await jobs.enqueue("batch", "acme", {})
    assert (await jobs.lease(KIND, "a", 1)).leases == []


async def test_many_runners_share_many_jobs_without_doubles(jobs):
    for n in range(60):
        await jobs.enqueue(KIND, "acme", {"n": n})
    seen: list[int] = []

    async def run(consumer: str) -> None:
        while leases := (await jobs.lease(KIND, consumer, 4)).leases:
            for lease in leases:
                seen.append(lease.payload["n"])
                assert await jobs.done(lease)

    await asyncio.gather(*(run(f"r{n}") for n in range(5)))
    assert sorted(seen) == list(range(60))


async def test_a_wrong_epoch_can_do_nothing(jobs):
    await jobs.enqueue(KIND, "acme", {})
    lease = await lease_one(jobs)
    forged = replace(lease, epoch=lease.epoch - 1)
    assert not await jobs.heartbeat(forged)
    assert not await jobs.dead(forged, "x")
    assert await jobs.done(lease)


async def test_a_runner_is_told_whether_there_is_more_to_take(jobs, redis):
    for n in range(3):
        await jobs.enqueue(KIND, "acme", {"n": n})
    assert not (await jobs.lease(KIND, "a", 2)).drained
    found = await jobs.lease(KIND, "a", 2)
    assert (len(found.leases), found.drained) == (1, True)
    gone, _ = [await jobs.enqueue(KIND, "acme", {"n": n}) for n in (3, 4)]
    await redis.delete(f"shoal:{{jobs:{KIND}}}:job:{gone}")
    found = await jobs.lease(KIND, "a", 1)
    assert (found.leases, found.drained) == ([], False), "a job that is gone says nothing of those behind it"
