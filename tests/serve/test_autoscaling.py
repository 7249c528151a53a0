"""Replicas follow the queue: a real cluster with a pool that goes from zero up, down and back to zero."""

import asyncio
import time
from collections.abc import Callable, Iterator

import pytest
from openai import AsyncOpenAI

from tests.conftest import System, config_of, running_system

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

MODEL = "elastic"
SLOTS = 4
WORDS_PER_S = 20
MOST = 3


@pytest.fixture(scope="module")
def elastic() -> Iterator[System]:
    """configs/scripted.yaml with a pool of 0 to 3 replicas of four slots, 20 words per second each."""
    config = config_of("scripted", auth={"mode": "open"})
    (model,) = [a for a in config["applications"] if a["import_path"] == "app.main:build_model"]
    quick = {"metrics_interval_s": 0.2, "look_back_period_s": 1}
    model |= {
        "name": MODEL,
        "autoscaling_policy": {
            "policy_function": "app.scaling:QueuePolicy",
            "policy_kwargs": {"LLMReplica": {"smoothing_s": 1, "hold_s": 2, "to_zero_s": 3}},
        },
        "args": {
            "model": MODEL,
            "engine": {
                "scripted": {
                    "max_sequences": SLOTS,
                    "itl_base_s": 1 / WORDS_PER_S,
                    "itl_per_sequence_s": 0,
                    "prefill_tokens_per_s": None,
                }
            },
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


def replicas(system: System, *states: str) -> int:
    """Replicas in these states; without any, those that run or drain."""
    deployment = system.status()[MODEL]["deployments"]["LLMReplica"]
    wanted = states or ("RUNNING", "STOPPING")
    return sum(replica["state"] in wanted for replica in deployment["replicas"])


async def until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < deadline, "it did not come true in time"
        await asyncio.sleep(0.3)


async def echoed(client: AsyncOpenAI, words: int) -> bool:
    """Ask for an answer of `words` words, streamed, and see whether all of it came."""
    text = " ".join(f"word{number}" for number in range(words))
    stream = await client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": text}], stream=True
    )
    return text == "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])


async def test_replicas_follow_the_load_from_zero_and_back_and_no_request_is_lost(elastic):
    async with elastic.client() as client:
        # From zero: the first request is held until there is a replica, not refused.
        assert replicas(elastic) == 0
        assert await echoed(client, WORDS_PER_S)
        assert replicas(elastic, "RUNNING") == 1

        # Open loop at twice what one replica does, for long enough that others can start.
        asking, started = [], time.monotonic()
        while time.monotonic() - started < 12:
            asking.append(asyncio.ensure_future(echoed(client, WORDS_PER_S)))
            await asyncio.sleep(1 / SLOTS / 2)
        assert 2 <= await asyncio.to_thread(replicas, elastic) <= MOST
        assert await asyncio.gather(*asking) == [True] * len(asking)

        # The load has ended: they drain and go, the last one too. And back again.
        await until(lambda: replicas(elastic) == 0, 60)
        assert await echoed(client, WORDS_PER_S)


async def test_a_replica_that_is_no_longer_needed_finishes_its_streams(elastic):
    async with elastic.client() as client:
        burst = [asyncio.ensure_future(echoed(client, 3 * WORDS_PER_S)) for _ in range(SLOTS * MOST)]
        await until(lambda: replicas(elastic, "RUNNING") >= 2, 30)
        # More than the burst leaves free on one replica, so they run on several.
        long = [asyncio.ensure_future(echoed(client, 12 * WORDS_PER_S)) for _ in range(SLOTS)]
        assert await asyncio.gather(*burst) == [True] * len(burst)
        await until(lambda: replicas(elastic, "STOPPING") >= 1, 30)
        assert not any(stream.done() for stream in long)
        assert await asyncio.gather(*long) == [True] * len(long)
