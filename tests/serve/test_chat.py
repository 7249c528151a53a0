"""Chat over HTTP with the official client: a real cluster, the scripted engine, two replicas."""

import asyncio
import json
import time

import httpx
import openai
import pytest
from pydantic import BaseModel

from tests.conftest import until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

MODEL = "scripted"


@pytest.fixture
async def client(scripted):
    async with scripted.client() as client:
        yield client


def user(text):
    return [{"role": "user", "content": text}]


def stages_ms(header):
    return {
        name: float(rest.removeprefix("dur=")) for name, rest in (p.split(";") for p in header.split(", "))
    }


async def test_a_streamed_answer_is_the_same_as_a_whole_one(client):
    whole = await client.chat.completions.create(model=MODEL, messages=user("Tell me about shoals of fish."))
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=user("Tell me about shoals of fish."),
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert text
    assert chunks[-1].usage == whole.usage
    assert whole.usage.completion_tokens == len(
        [c for c in chunks if c.choices and c.choices[0].delta.content]
    )


async def test_every_answer_says_where_its_time_went_and_what_its_id_is(scripted):
    started = time.perf_counter()
    async with httpx.AsyncClient() as http:
        response = await http.post(
            f"{scripted.http}/v1/chat/completions",
            json={"model": MODEL, "messages": user("hello there"), "max_tokens": 5},
            headers={"x-request-id": "my-own-id"},
        )
    wall_ms = (time.perf_counter() - started) * 1e3
    assert response.headers.get_list("x-request-id") == ["my-own-id"]
    stages = stages_ms(response.headers["server-timing"])
    assert {"auth", "queue", "prefill", "decode", "other"} <= set(stages)
    assert 0 < sum(stages.values()) <= wall_ms


async def test_a_stream_ends_with_the_time_of_all_its_stages(scripted):
    async with httpx.AsyncClient() as http:
        response = await http.post(
            f"{scripted.http}/v1/chat/completions",
            json={"model": MODEL, "messages": user("one two three four five six"), "stream": True},
        )
    *_, timing, done = [line for line in response.text.split("\n\n") if line]
    assert done == "data: [DONE]"
    assert timing.startswith(": server-timing ")
    stages = stages_ms(timing.removeprefix(": server-timing "))
    assert stages["decode"] > 0
    assert response.headers["content-type"].startswith("text/event-stream")


async def test_two_hundred_streams_at_once_each_get_their_own_answer(client):

    async def ask(number):
        text = f"request number {number} wants its own words back"
        stream = await client.chat.completions.create(model=MODEL, messages=user(text), stream=True)
        got = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
        return "".join(got) == text

    assert all(await asyncio.gather(*(ask(number) for number in range(200))))


async def test_tools_structured_output_and_choices_come_through(client):
    tool = {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
                "required": ["a", "b"],
            },
        },
    }
    called = await client.chat.completions.create(model=MODEL, messages=user("add 2 and 3"), tools=[tool])
    [call] = called.choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments.replace(" ", "")) == ("add", '{"a":2,"b":3}')
    assert called.choices[0].finish_reason == "tool_calls"

    class City(BaseModel):
        name: str
        people: int

    parsed = await client.chat.completions.parse(
        model=MODEL, messages=user("Oslo 700000"), response_format=City
    )
    assert isinstance(parsed.choices[0].message.parsed, City)

    several = await client.chat.completions.create(
        model=MODEL, messages=user("a b c"), n=3, logprobs=True, top_logprobs=2
    )
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert len(several.choices[0].logprobs.content[0].top_logprobs) == 2


async def test_text_completions_and_models_are_served(client):
    answer = await client.completions.create(model=MODEL, prompt="once upon a time", max_tokens=3)
    assert answer.usage.completion_tokens == 3
    assert MODEL in [model.id async for model in client.models.list()]
    assert (await client.models.retrieve(MODEL)).id == MODEL


async def test_errors_are_openais_with_the_right_status(scripted, client):
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="nope", messages=user("x"))
    assert missing.value.code == "model_not_found"
    assert MODEL in missing.value.message
    with pytest.raises(openai.BadRequestError):
        await client.chat.completions.create(model=MODEL, messages=[])
    with pytest.raises(openai.BadRequestError) as long:
        await client.chat.completions.create(model=MODEL, messages=user("word " * 20_000))
    assert long.value.code == "context_length_exceeded"
    async with httpx.AsyncClient(timeout=30) as http:
        url = f"{scripted.http}/v1/chat/completions"
        json = {"content-type": "application/json"}
        assert (await http.post(url, content=b"{broken", headers=json)).status_code == 400
        assert (await http.post(url, content=b'"' + b"x" * 14_000_000, headers=json)).status_code == 413
        assert (await http.get(f"{scripted.http}/nothing/here")).json()["error"]["code"]


async def test_a_client_that_leaves_frees_its_slot_in_the_engine(scripted, client):
    def running():
        return scripted.samples("shoal_engine_running", "replica")

    # Ahead of the test that crashes a replica, which leaves its last value behind.
    await until(lambda: sum(running().values()) == 0, timeout_s=20)
    stream = await client.chat.completions.create(
        model=MODEL, messages=user("word " * 2000), stream=True, max_tokens=4000
    )
    await anext(aiter(stream))

    def busy():
        return [replica for replica, count in running().items() if count > 0]

    await until(lambda: len(busy()) == 1, timeout_s=15)
    await stream.close()
    await until(lambda: busy() == [], timeout_s=8)  # the answer alone would take 24 s
    await until(lambda: scripted.metric("shoal_tickets_in_flight") == 0)


async def streamed(scripted, text, **headers):
    """The events of a streamed answer, without the one that says [DONE], and whether that came."""
    async with httpx.AsyncClient(timeout=60, headers=headers) as http:
        response = await http.post(
            f"{scripted.http}/v1/chat/completions",
            json={"model": MODEL, "messages": user(text), "stream": True},
        )
    data = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line.startswith("data: ")]
    return [json.loads(event) for event in data if event != "[DONE]"], data[-1] == "[DONE]"


async def test_an_engine_that_crashes_in_the_middle_of_a_stream_costs_its_reader_nothing(scripted, client):
    text = "[[shoal:crash after=3]] " + "word " * 40
    events, done = await streamed(scripted, text)
    assert done
    assert not any("error" in event for event in events)
    pieces = [choice["delta"].get("content") or "" for event in events for choice in event["choices"]]
    assert "".join(pieces) == text
    # The crashed replica is replaced; until then the other one serves.
    answer = await client.chat.completions.create(model=MODEL, messages=user("still there?"))
    assert answer.choices[0].finish_reason == "stop"


async def test_a_failure_in_the_middle_of_a_stream_is_an_error_event_and_the_end(scripted):
    events, done = await streamed(scripted, "word " * 2000, **{"x-request-timeout-ms": "2500"})
    assert not done
    *before, last = events
    assert before
    assert not any("error" in event for event in before)
    assert last["error"]["code"] == "deadline_exceeded"
