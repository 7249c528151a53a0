"""Rows 1, 2, 24, 25, 26: engines and replicas that die, vanish, run out of memory or hang."""

import asyncio
import random
from collections import Counter

from tests.chaos import faults
from tests.chaos.load import OpenLoop, body
from tests.chaos.outcomes import Figure, Result
from tests.chaos.rows import Size, added_p99, longest_gap, resumed, row
from tests.chaos.systems import REPLICAS, Chaos, rate_rps, victim
from tests.chaos.wire import CHAT, post
from tests.conftest import app_of, until

WHOLE, STREAM = 50, 100  # tokens: two and four seconds
_SETTLE_S = 3  # a new replica gets work before the next one dies


@row("1", "kill -9 one of 2 LLM replicas, unary", "0 failed; added p99 ≤ 5 s; capacity back ≤ 15 s")
async def replica_killed_unary(chaos: Chaos, size: Size, result: Result) -> None:
    before = faults.pids(chaos.system)
    async with OpenLoop(chaos.system, rate_rps(WHOLE), WHOLE, stream=False) as load:
        await asyncio.sleep(size.before_s)
        killed_at = faults.kill(victim(before))
        back_s = await faults.seconds_until_others(chaos.system, before)
        await asyncio.sleep(max(size.after_s - back_s, 1))
    result.calls = load.calls
    result.figures = [
        added_p99(load.calls, killed_at, most=5, ci_most=20),
        Figure(name="capacity back", value=back_s, most=15, ci_most=60),
    ]


@row(
    "2",
    "the same mid-stream, again and again",
    "all ok by resume; longest gap ≤ 0.5 s detection + 0.2 s; every token once",
)
async def replica_killed_mid_stream(chaos: Chaos, size: Size, result: Result) -> None:
    killed_at: list[float] = []
    dice = random.Random(2)
    async with OpenLoop(chaos.system, rate_rps(STREAM), STREAM, stream=True) as load:
        await asyncio.sleep(size.before_s)
        while len(killed_at) < size.kills:
            before = faults.pids(chaos.system)
            killed_at.append(faults.kill(dice.choice(sorted(before))))
            await faults.seconds_until_others(chaos.system, before)
            await asyncio.sleep(_SETTLE_S)
        while len(load.calls) < size.streams:
            await asyncio.sleep(0.5)
    result.calls = load.calls
    result.figures = [
        longest_gap(load.calls, most=0.7, ci_most=10),
        resumed(load.calls, killed_at),
        Figure(name="kills", value=len(killed_at), unit="", least=size.kills),
        Figure(name="streams", value=len(load.calls), unit="", least=size.streams),
        Figure(name="tokens", value=sum(call.tokens for call in load.calls), unit=""),
    ]


@row("24", "node loss: kill -9 of a second node's raylet", "only its in-flight, resumed as in 2; ≤ 30 s")
async def node_lost(chaos: Chaos, size: Size, result: Result) -> None:
    system = chaos.system
    async with faults.second_node(system) as node:
        bigger = chaos.config()
        app_of(bigger, "build_model")["deployments"][0]["num_replicas"] = REPLICAS + 2
        try:
            system.put(bigger)
            await until(lambda: len(faults.pids(system)) == REPLICAS + 2, timeout_s=90)
            nodes = Counter(one["node_id"] for one in faults.replicas(system))
            assert len(nodes) == 2, f"all replicas are on one node: {nodes}"
            async with OpenLoop(system, rate_rps(STREAM), STREAM, stream=True) as load:
                await asyncio.sleep(size.before_s)
                killed_at = faults.kill(node.raylet)
                await asyncio.sleep(size.after_s)
        finally:
            system.put(system.config)
    result.calls = load.calls
    result.figures = [
        longest_gap(load.calls, most=30, ci_most=45),
        resumed(load.calls, [killed_at + late for late in range(3)]),
    ]


@row("25", "engine out of memory", "one replica restarts; its requests resume elsewhere")
async def engine_out_of_memory(chaos: Chaos, size: Size, result: Result) -> None:
    before = faults.pids(chaos.system)
    async with OpenLoop(chaos.system, rate_rps(STREAM), STREAM, stream=True) as load:
        await asyncio.sleep(size.before_s)
        # The request that orders it is answered long before.
        told_at = await _tell_one_engine(chaos, f"oom after={STREAM}")
        back_s = await faults.seconds_until_others(chaos.system, before)
        await asyncio.sleep(max(size.after_s - back_s, 1))
    after = faults.pids(chaos.system)
    result.calls = load.calls
    result.figures = [
        longest_gap(load.calls, most=5, ci_most=15),
        resumed(load.calls, [told_at, told_at + 1]),
        Figure(name="replicas replaced", value=len(before - after), unit="", most=1, least=1),
        Figure(name="capacity back", value=back_s),
    ]


@row("26", "a replica hangs (SIGSTOP)", "detected ≤ 15 s, work re-dispatched")
async def replica_stopped(chaos: Chaos, size: Size, result: Result) -> None:
    async with OpenLoop(chaos.system, rate_rps(STREAM), STREAM, stream=True) as load:
        await asyncio.sleep(size.before_s)
        async with faults.stopped(victim(faults.pids(chaos.system))) as stopped_at:
            await asyncio.sleep(size.stopped_s)
        await asyncio.sleep(2)  # what it still says of the work that it lost reaches nobody
    result.calls = load.calls
    result.figures = [longest_gap(load.calls, most=15, ci_most=20), resumed(load.calls, [stopped_at])]


@row("26 engine", "the engine hangs, its replica does not", "detected ≤ 15 s, work re-dispatched")
async def engine_hangs(chaos: Chaos, size: Size, result: Result) -> None:
    before = faults.pids(chaos.system)
    async with OpenLoop(chaos.system, rate_rps(STREAM), STREAM, stream=True) as load:
        await asyncio.sleep(size.before_s)
        told_at = await _tell_one_engine(chaos, f"hang after={STREAM}")
        await faults.seconds_until_others(chaos.system, before)
        await asyncio.sleep(2)
    result.calls = load.calls
    result.figures = [
        longest_gap(load.calls, most=15, ci_most=40),
        resumed(load.calls, [told_at, told_at + 1]),
    ]


async def _tell_one_engine(chaos: Chaos, fault: str) -> float:
    """Arm a fault in whichever engine answers; returns the loop's time of it."""
    asked = body(f"[[shoal:{fault}]]", stream=False)
    async with post(chaos.system.http + CHAT, asked) as response:
        assert response.status == 200, await response.json()
        await response.json()
    return asyncio.get_running_loop().time()
