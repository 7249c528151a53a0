"""When a cluster says that it takes traffic."""

import asyncio

from actors.policies.steadiness import Steadiness
from actors.ready_gate import ReadyGateConfig, wait_until_ready


def test_whoever_fails_once_begins_anew():
    steadiness = Steadiness(hold_s=10)
    steadiness.saw({"a", "b"}, 0)
    steadiness.saw({"a"}, 5)
    steadiness.saw({"a", "b"}, 6)
    assert steadiness.steady(10) == {"a"}
    assert steadiness.steady(15.9) == {"a"}
    assert steadiness.steady(16) == {"a", "b"}


async def test_the_gate_opens_when_enough_nodes_have_answered_for_long_enough(monkeypatch):
    monkeypatch.setattr("actors.ready_gate._PROBE_S", 0.01)
    nodes, well = ["a"], {"a"}

    async def healthy(node, _port):
        return node in well

    config = ReadyGateConfig(nodes=2, hold_s=0.1)
    waiting = asyncio.create_task(wait_until_ready(config, lambda: list(nodes), healthy))
    await asyncio.sleep(0.2)
    assert not waiting.done()  # one of two
    nodes.append("b")
    await asyncio.sleep(0.05)
    assert not waiting.done()  # there, and not healthy
    well.add("b")
    await asyncio.sleep(0.05)
    assert not waiting.done()  # not for long enough
    assert await asyncio.wait_for(waiting, 2) > 0.3
