"""More work than slots: what must wait waits in the queue, what cannot make it is refused at once."""

import asyncio
import time

import httpx
import pytest

from tests.conftest import app_of, config_of, running_system, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

SLOTS, SERVICE_S = 4, 0.25


@pytest.fixture(scope="module")
def small():
    """One replica with four slots of a quarter of a second, and nothing else."""
    config = config_of("scripted", auth={"mode": "open"}, retrieval=None)
    model = app_of(config, "build_model")
    model["args"]["engine"]["scripted"] = {"max_sequences": SLOTS, "fixed_service_s": SERVICE_S}
    model["deployments"] = [{"name": "LLMReplica", "num_replicas": 1}]
    config["applications"] = [model, app_of(config, "build_gateway")]
    with running_system(config) as system:
        yield system


async def ask(http, url, **headers):
    started = time.perf_counter()
    body = {"model": "scripted", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    response = await http.post(f"{url}/v1/chat/completions", json=body, headers=headers)
    return response, time.perf_counter() - started


async def test_everything_that_can_wait_is_answered_and_the_wait_is_the_queues(small):
    async with httpx.AsyncClient(timeout=60) as http:
        answers = await asyncio.gather(*(ask(http, small.http) for _ in range(40)))
    assert [response.status_code for response, _ in answers] == [200] * 40
    slowest = max(answers, key=lambda answer: answer[1])[0]
    stages = dict(part.split(";dur=") for part in slowest.headers["server-timing"].split(", "))
    assert float(stages["queue"]) > 1000  # ten rounds of a quarter of a second
    await until(lambda: small.metric("shoal_tickets_in_flight") == 0)


async def test_what_would_miss_its_deadline_is_refused_at_once_with_a_computed_retry_after(small):
    async with httpx.AsyncClient(timeout=60) as http:
        await ask(http, small.http)  # the queue knows the service time now
        waiting = [asyncio.create_task(ask(http, small.http)) for _ in range(60)]
        await asyncio.sleep(1.0)  # about 44 of them wait: nearly three seconds of work
        refused, took_s = await ask(http, small.http, **{"x-request-timeout-ms": "1000"})
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "overloaded"
        assert 1 <= int(refused.headers["retry-after"]) <= 10
        assert took_s < 1.0
        answers = await asyncio.gather(*waiting)
    assert all(response.status_code == 200 for response, _ in answers)
