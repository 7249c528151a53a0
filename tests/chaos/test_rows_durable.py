"""Rows of the fault table about durable work, on the system that the whole session shares."""

import asyncio

import pytest

from tests.chaos import faults
from tests.chaos.load import words
from tests.conftest import until

pytestmark = [pytest.mark.cluster, pytest.mark.chaos, pytest.mark.timeout(240)]

MODEL = "scripted"


async def polled(client, response_id):
    async with asyncio.timeout(150):
        while True:
            response = await client.responses.retrieve(response_id)
            if response.status not in ("queued", "in_progress"):
                return response
            await asyncio.sleep(0.1)


async def test_row_19_a_request_that_kills_its_replicas_becomes_a_dead_letter_and_harms_nobody(scripted):
    async with scripted.client() as client:
        before = faults.pids(scripted)
        ask = {"model": MODEL, "background": True, "temperature": 0}
        poison = await client.responses.create(**ask, input="[[shoal:exit]]")
        others = [await client.responses.create(**ask, input=words(n, 200)) for n in range(10)]
        for n, other in enumerate(others):
            done = await polled(client, other.id)
            assert (done.status, done.output_text) == ("completed", words(n, 200)), done.error
        failed = await polled(client, poison.id)
        assert (failed.status, failed.error.code) == ("failed", "server_error")
        assert "3 replicas failed under this request" in failed.error.message
        await until(lambda: len(faults.pids(scripted)) == len(before), timeout_s=90)
        whole = await client.responses.create(model=MODEL, input="hello")
        assert whole.status == "completed"


async def test_row_27_the_same_idempotency_key_twice_is_one_run_and_the_same_answer(scripted):
    async with scripted.client() as client:
        for background in (True, False):
            headers = {"Idempotency-Key": f"row-27-{background}"}
            ask = {"model": MODEL, "input": words(27, 50), "background": background, "extra_headers": headers}
            made = await asyncio.gather(*(client.responses.create(**ask) for _ in range(5)))
            assert len({one.id for one in made}) == 1
            done = await polled(client, made[0].id)
            assert done.status == "completed"
            assert await client.responses.create(**ask) == done
