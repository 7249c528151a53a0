"""`/v1/responses` with the official client: made while the caller waits, stored, searched for, resumed."""

import asyncio

import openai
import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

MODEL = "scripted"


@pytest.fixture
async def client(scripted):
    async with scripted.client() as client:
        yield client


async def test_an_answer_is_given_stored_retrieved_and_deleted(client):
    made = await client.responses.create(
        model=MODEL, input="Tell me about herrings.", metadata={"a": "b"}, temperature=0
    )
    assert (made.status, made.object, made.error, made.background) == ("completed", "response", None, False)
    assert made.output_text
    assert made.usage.output_tokens > 0
    assert made.usage.total_tokens == made.usage.input_tokens + made.usage.output_tokens
    assert made.metadata == {"a": "b"}
    again = await client.responses.retrieve(made.id)
    assert again == made
    items = await client.responses.input_items.list(made.id)
    assert [item.content[0].text for item in items.data] == ["Tell me about herrings."]
    await client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(made.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.delete(made.id)


async def test_a_streamed_answer_has_openais_events_in_order_and_says_the_same(client):
    ask = {"model": MODEL, "input": "Tell me about herrings.", "temperature": 0}
    whole = await client.responses.create(**ask)
    events = [event async for event in await client.responses.create(**ask, stream=True)]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    names = [event.type for event in events]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert names[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert names[4 : 4 + len(deltas)] == ["response.output_text.delta"] * len(deltas)
    assert names[4 + len(deltas) :] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.completed",
    ]  # fmt: skip
    assert "".join(delta.delta for delta in deltas) == whole.output_text == events[-1].response.output_text
    assert events[-1].response.usage == whole.usage
    assert await client.responses.retrieve(events[-1].response.id) == events[-1].response


async def test_the_clients_own_stream_helper_takes_it(client):
    async with client.responses.stream(model=MODEL, input="hello") as stream:
        seen = [event.type async for event in stream]
        final = await stream.get_final_response()
    assert "response.output_text.delta" in seen
    assert final.output_text


async def test_input_items_instructions_and_limits_are_understood(client):
    made = await client.responses.create(
        model=MODEL,
        instructions="Be brief.",
        input=[
            {"role": "developer", "content": "You know fish."},
            {"role": "user", "content": [{"type": "input_text", "text": "Tell me about eels, at length."}]},
        ],
        max_output_tokens=3,
        top_p=0.5,
        store=False,
    )
    assert (made.status, made.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert made.usage.output_tokens == 3
    assert made.instructions == "Be brief."
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(made.id)


async def test_an_answer_can_be_made_to_fit_a_schema(client):
    schema = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    made = await client.responses.create(
        model=MODEL,
        input="Name a fish.",
        text={"format": {"type": "json_schema", "name": "fish", "schema": schema}},
    )
    assert '"name"' in made.output_text


async def test_a_conversation_goes_on_from_an_earlier_answer(client):
    first = await client.responses.create(model=MODEL, input="Hello there, I am a tern.")
    second = await client.responses.create(model=MODEL, input="And who am I?", previous_response_id=first.id)
    alone = await client.responses.create(model=MODEL, input="And who am I?")
    assert second.previous_response_id == first.id
    assert second.usage.input_tokens > alone.usage.input_tokens + first.usage.output_tokens
    third = await client.responses.create(
        model=MODEL, input=[*first.output, {"role": "user", "content": "And?"}]
    )
    assert third.output_text
    with pytest.raises(openai.NotFoundError):
        await client.responses.create(model=MODEL, input="x", previous_response_id=f"resp_{'0' * 32}")


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        ({"tools": [{"type": "web_search"}]}, "allowed: file_search"),
        ({"tools": [{"type": "function", "name": "f", "parameters": {}, "strict": True}]}, "file_search"),
        ({"input": []}, "input"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "o"}]}, "file_search_call"),
        ({"conversation": "conv_1"}, "previous_response_id"),
        ({"background": True, "store": False}, "store"),
        ({"include": ["reasoning.encrypted_content"]}, "file_search_call.results"),
        ({"temperature": 3}, "2"),
    ],
)
async def test_what_is_not_served_is_refused_with_what_is(client, ask, says):
    with pytest.raises(openai.BadRequestError, match=says):
        await client.responses.create(**{"model": MODEL, "input": "hi", **ask})


async def test_an_unknown_model_is_not_found(client):
    for background in (False, True):
        with pytest.raises(openai.NotFoundError, match="available: scripted"):
            await client.responses.create(model="nope", input="hi", background=background)


async def test_file_search_gives_events_results_and_citations(client):
    store = await client.vector_stores.create(name="fish")
    await client.vector_stores.files.upload_and_poll(
        vector_store_id=store.id,
        file=("eels.txt", b"Eels migrate to the Sargasso Sea to spawn. " * 5),
        poll_interval_ms=100,
    )
    ask = {
        "model": MODEL,
        "input": "Where do eels spawn?",
        "tools": [{"type": "file_search", "vector_store_ids": [store.id], "max_num_results": 3}],
        "include": ["file_search_call.results"],
    }
    events = [event async for event in await client.responses.create(**ask, stream=True)]
    names = [event.type for event in events]
    assert names[2:7] == [
        "response.output_item.added",
        "response.file_search_call.in_progress",
        "response.file_search_call.searching",
        "response.file_search_call.completed",
        "response.output_item.done",
    ]
    assert "response.output_text.annotation.added" in names
    for response in (events[-1].response, await client.responses.create(**ask, background=True)):
        while response.status in ("queued", "in_progress"):
            await asyncio.sleep(0.05)
            response = await client.responses.retrieve(  # noqa: PLW2901  polled
                response.id, include=["file_search_call.results"]
            )
        search, message = response.output
        assert (search.type, search.status, search.queries) == (
            "file_search_call", "completed", ["Where do eels spawn?"],
        )  # fmt: skip
        assert {result.filename for result in search.results} == {"eels.txt"}
        assert {one.filename for one in message.content[0].annotations} == {"eels.txt"}
    with pytest.raises(openai.NotFoundError):
        await client.responses.create(
            **{**ask, "tools": [{"type": "file_search", "vector_store_ids": ["vs_none"]}], "background": True}
        )


async def test_the_same_key_twice_is_one_run_and_the_same_answer(client):
    headers = {"Idempotency-Key": "once-and-for-all"}
    ask = {"model": MODEL, "input": "Tell me about sprats, at length.", "extra_headers": headers}
    first, second = await asyncio.gather(client.responses.create(**ask), client.responses.create(**ask))
    assert first == second
    assert await client.responses.create(**ask) == first
    with pytest.raises(openai.ConflictError):
        await client.responses.create(**{**ask, "input": "something else"})
