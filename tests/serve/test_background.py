"""Background responses with the official client: polled, streamed, resumed at any event, cancelled, done once."""

import asyncio

import openai
import pytest

from tests.chaos import faults
from tests.chaos.load import words
from tests.conftest import until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

MODEL = "scripted"
LONG = words(1, 300)  # two seconds of answer: the engine repeats what it is told


@pytest.fixture
async def client(scripted):
    async with scripted.client() as client:
        yield client


async def polled(client, response_id):
    async with asyncio.timeout(60):
        while True:
            response = await client.responses.retrieve(response_id)
            if response.status not in ("queued", "in_progress"):
                return response
            await asyncio.sleep(0.05)


async def test_a_background_response_is_accepted_at_once_and_answered_by_itself(client):
    whole = await client.responses.create(model=MODEL, input="hello", temperature=0)
    accepted = await client.responses.create(model=MODEL, input="hello", temperature=0, background=True)
    assert (accepted.status, accepted.background, accepted.output) == ("queued", True, [])
    done = await polled(client, accepted.id)
    assert (done.status, done.output_text, done.usage) == ("completed", whole.output_text, whole.usage)


async def test_the_stream_of_a_background_response_can_be_left_and_resumed_at_any_event(client):
    ask = {"model": MODEL, "input": LONG, "temperature": 0}
    whole = await client.responses.create(**ask)
    stream = await client.responses.create(**ask, background=True, stream=True)
    events = []
    async for event in stream:
        events.append(event)
        if event.type == "response.output_text.delta":
            break
    await stream.close()  # the client is gone; the answer goes on
    response_id = events[0].response.id
    assert [event.type for event in events[:3]] == [
        "response.created", "response.queued", "response.in_progress",
    ]  # fmt: skip

    async def resumed(after):
        found = await client.responses.retrieve(response_id, stream=True, starting_after=after)
        return [event async for event in found]

    rest = await resumed(events[-1].sequence_number)
    everything = [*events, *rest]
    assert [event.sequence_number for event in everything] == list(range(len(everything)))
    text = "".join(event.delta for event in everything if event.type == "response.output_text.delta")
    assert text == whole.output_text == everything[-1].response.output_text
    last = everything[-1].sequence_number
    for after in (0, 3, last // 2, last - 1):
        assert await resumed(after) == everything[after + 1 :]
    assert await resumed(last) == []


async def test_a_waiting_and_a_running_response_are_cancelled_and_the_engine_stops(scripted, client):
    accepted = await client.responses.create(model=MODEL, input=words(2, 3500), background=True)
    await until(lambda: scripted.metric("shoal_engine_running") > 0)
    cancelled = await client.responses.cancel(accepted.id)
    assert (cancelled.status, cancelled.id) == ("cancelled", accepted.id)
    await until(lambda: scripted.metric("shoal_engine_running") == 0)
    assert (await client.responses.retrieve(accepted.id)).status == "cancelled"
    assert (await client.responses.cancel(accepted.id)).status == "cancelled"
    events = [event async for event in await client.responses.retrieve(accepted.id, stream=True)]
    assert (events[-1].type, events[-1].response.status) == ("response.incomplete", "cancelled")
    waited_for = await client.responses.create(model=MODEL, input="hello")
    with pytest.raises(openai.BadRequestError, match="background"):
        await client.responses.cancel(waited_for.id)


async def test_the_same_key_twice_is_one_job_and_the_same_answer(client):
    ask = {
        "model": MODEL,
        "input": "hello",
        "background": True,
        "extra_headers": {"Idempotency-Key": "a-job"},
    }
    first, second = await asyncio.gather(client.responses.create(**ask), client.responses.create(**ask))
    assert first.id == second.id
    assert await polled(client, first.id) == await client.responses.create(**ask)
    with pytest.raises(openai.ConflictError):
        await client.responses.create(**{**ask, "input": "another"})


async def test_it_runs_in_class_batch_unless_the_keys_own_is_asked_for(scripted, client):
    await asyncio.sleep(1.5)  # what came before is in the metrics by then
    before = scripted.samples("shoal_queue_wait_seconds_count", "class")
    for tier in (None, "default"):
        more = {} if tier is None else {"service_tier": tier}
        made = await client.responses.create(model=MODEL, input="hello", background=True, **more)
        assert made.service_tier == ("flex" if tier is None else "default")
        await polled(client, made.id)

    def counted():
        after = scripted.samples("shoal_queue_wait_seconds_count", "class")
        return {name: after.get(name, 0) - before.get(name, 0) for name in ("batch", "standard")}

    await until(lambda: counted() == {"batch": 1, "standard": 1})


async def test_a_request_that_is_refused_by_the_engine_is_a_failed_response(client):
    made = await client.responses.create(model=MODEL, input="[[shoal:nonsense]]", background=True)
    failed = await polled(client, made.id)
    assert (failed.status, failed.error.code) == ("failed", "invalid_prompt")
    assert "nonsense" in failed.error.message


@pytest.mark.chaos
async def test_a_response_survives_its_runner_and_its_reader_resumes_from_the_exact_token(scripted, client):
    ask = {"model": MODEL, "input": LONG, "temperature": 0}
    whole = await client.responses.create(**ask)
    slow = {**ask, "background": True, "stream": True}
    stream = await client.responses.create(**slow)
    events = []
    killed = False
    async for event in stream:
        events.append(event)
        if not killed and event.type == "response.output_text.delta" and event.sequence_number > 12:
            killed = True
            [runner] = faults.pids(scripted, "retrieval", "JobRunner")
            faults.kill(runner)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text
    assert events[-1].response.usage.output_tokens == whole.usage.output_tokens
    scripted.wait_for("retrieval")
