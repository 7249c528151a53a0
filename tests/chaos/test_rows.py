"""Rows of the fault table on real processes, each once and short, and what else the token path must survive.

One system for the module, in Serve's default mode; every test finds it in order and leaves it so, with right books.
"""

import asyncio
from collections.abc import Iterator

import pytest

from tests.chaos import faults
from tests.chaos.load import MODEL, OpenLoop, ask
from tests.chaos.outcomes import Outcome, classes
from tests.chaos.report import held
from tests.chaos.systems import Chaos, chaos, rate_rps
from tests.conftest import app_of, until

pytestmark = [pytest.mark.cluster, pytest.mark.chaos, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def shared() -> Iterator[Chaos]:
    with chaos("default") as shared:
        yield shared


async def test_row_01_whole_answers_survive_the_death_of_a_replica(shared):
    await held(shared, "1")


async def test_row_02_streams_of_a_dead_replica_go_on_elsewhere_every_token_once(shared):
    await held(shared, "2")


async def test_row_03_a_gateway_that_dies_takes_only_its_own_and_no_job(shared):
    await held(shared, "3")


async def test_row_04_the_proxy_is_back_soon_after_its_death(shared):
    await held(shared, "4")


async def test_row_05_nothing_is_lost_when_the_queue_dies_and_it_goes_on_soon(shared):
    await held(shared, "5")


async def test_row_06_nobody_notices_the_death_of_the_controller(shared):
    await held(shared, "6")


async def test_row_15_clients_that_leave_free_the_engine_and_take_nobody_with_them(shared):
    await held(shared, "15")


async def test_row_17_overload_is_refused_early_and_goodput_stays(shared):
    await held(shared, "17")


async def test_row_20_what_is_too_large_is_refused_before_the_queue(shared):
    await held(shared, "20")


async def test_row_23_a_rolling_update_fails_nobody(shared):
    await held(shared, "23")


async def test_row_24_streams_of_a_lost_node_go_on_elsewhere(shared):
    await held(shared, "24")


async def test_row_25_an_engine_out_of_memory_is_replaced_and_its_streams_go_on_elsewhere(shared):
    await held(shared, "25")


async def test_row_26_streams_of_a_replica_that_hangs_go_on_elsewhere(shared):
    await held(shared, "26")


async def test_row_26_streams_of_an_engine_that_hangs_go_on_elsewhere(shared):
    await held(shared, "26 engine")


async def test_scaling_down_cuts_no_stream_and_ends_as_soon_as_they_have(shared):
    async with shared.fault() as system:
        smaller = shared.config()
        app_of(smaller, "build_model")["deployments"][0]["num_replicas"] = 1
        async with OpenLoop(system, rate_rps(100, 0.2), 100, stream=True) as load:
            await asyncio.sleep(2)
            system.put(smaller)
            await until(lambda: len(faults.pids(system)) == 1, timeout_s=30)
            await asyncio.sleep(1)  # late work, also over gateways that still stream from the leaving replica
        try:
            assert classes(load.calls) == {Outcome.OK: len(load.calls)}
            await until(lambda: not faults.replicas(system, state="STOPPING"), timeout_s=30)
        finally:
            system.put(system.config)


async def test_a_model_that_is_removed_ends_its_streams_first(shared):
    async with shared.fault() as system:
        smaller = shared.config()
        smaller["applications"] = [app for app in smaller["applications"] if app["name"] != MODEL]
        streams = [asyncio.create_task(ask(system, 100, stream=True)) for _ in range(4)]
        await asyncio.sleep(1)
        system.put(smaller)
        try:
            assert classes(await asyncio.gather(*streams)) == {Outcome.OK: 4}
            await until(lambda: MODEL not in system.status(), timeout_s=30)
            late = await ask(system, 5, stream=False)
            assert (late.outcome, late.status in (404, 503)) == (Outcome.CLEAN_ERROR, True), late
        finally:
            system.put(system.config)
            system.wait_for(MODEL)
