"""Replicas follow the queue: a real cluster with a pool that goes from zero up, down and back to zero."""

import asyncio
import time
from collections.abc import Callable, Iterator

import pytest
import yaml

from tests.conftest import ROOT, System, running_system

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

MODEL = "elastic"
SLOTS = 4
SERVICE_S = 1.0
MOST = 3


@pytest.fixture(scope="module")
def elastic() -> Iterator[System]:
    """configs/scripted.yaml with a pool of 0 to 3 replicas of four slots, a second per request."""
    config = yaml.safe_load((ROOT / "configs" / "scripted.yaml").read_text())
    (model,) = [a for a in config["applications"] if a["import_path"] == "app.main:build_model"]
    quick = {"metrics_interval_s": 0.2, "look_back_period_s": 1}
    model |= {
        "name": MODEL,
        "autoscaling_policy": {
            "policy_function": "app.scaling:QueuePolicy",
            "policy_kwargs": {"LLMReplica": {"hold_s": 3, "to_zero_s": 4}},
        },
        "args": {
            "model": MODEL,
            "engine": {"scripted": {"max_sequences": SLOTS, "fixed_service_s": SERVICE_S}},
        },
        "deployments": [
            {"name": "BatchingQueue", "autoscaling_config": {"min_replicas": 1, "max_replicas": 1, **quick}},
            {
                "name": "LLMReplica",
                "autoscaling_config": {
                    "min_replicas": 0,
                    "max_replicas": MOST,
                    "initial_replicas": 0,
                    "upscale_delay_s": 0,
                    "downscale_delay_s": 0,
                    **quick,
                },
            },
        ],
    }
    with running_system(config) as system:
        yield system


def replicas(system: System) -> int:
    """Replicas that run or drain."""
    deployment = system.status()[MODEL]["deployments"]["LLMReplica"]
    return sum(replica["state"] in {"RUNNING", "STOPPING"} for replica in deployment["replicas"])


async def until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < deadline, "it did not come true in time"
        await asyncio.sleep(0.3)


async def test_replicas_follow_the_load_from_zero_and_back_and_no_request_is_lost(elastic):
    answered = 0

    async def ask(number: int) -> None:
        nonlocal answered
        text = f"request number {number}"
        answer = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": text}]
        )
        assert answer.choices[0].message.content == text
        answered += 1

    async with elastic.client() as client:
        # From zero: the first request is held until there is a replica, not refused.
        assert replicas(elastic) == 0
        await ask(0)
        await until(lambda: replicas(elastic) == 1, 5)

        # Open loop at twice what one replica does, for long enough that others can start.
        started, sent, asking = time.monotonic(), 1, []
        while time.monotonic() - started < 20:
            asking.append(asyncio.ensure_future(ask(sent)))
            sent += 1
            await asyncio.sleep(SERVICE_S / SLOTS / 2)
        assert replicas(elastic) >= 2
        assert replicas(elastic) <= MOST
        await asyncio.gather(*asking)
        assert answered == sent

        # The load has ended: they drain, one by one or all at once, and the last one goes too.
        await until(lambda: replicas(elastic) == 0, 60)
        await ask(sent)
        assert answered == sent + 1


async def test_a_replica_that_drains_finishes_what_it_runs(elastic):
    async with elastic.client() as client:
        long = [
            client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": f"request number {number}"}], stream=True
            )
            for number in range(SLOTS * MOST * 2)
        ]
        streams = await asyncio.gather(*long)
        texts = await asyncio.gather(*(whole(stream) for stream in streams))
    assert texts == [f"request number {number}" for number in range(len(long))]


async def whole(stream) -> str:
    return "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])
