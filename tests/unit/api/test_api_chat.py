from __future__ import annotations

import asyncio
import json
import re

import openai
import pytest
from pydantic import BaseModel

from actors.errors import ContextLengthExceeded, EngineFailed, Overloaded
from actors.types import Passage, PriorityClass, TokenDelta, TokenLogprob, ToolCallDelta, Usage

MESSAGES = [{"role": "user", "content": "hi"}]
USAGE = Usage(prompt_tokens=5, completion_tokens=3)
PASSAGES = (
    Passage(chunk_id="c1", file_id="file-1", filename="a.md", vector_store_id="vs_1", text="Herring swim in shoals.",
            score=0.9),
    Passage(chunk_id="c2", file_id="file-2", filename="b.md", vector_store_id="vs_1", text="Whales breathe air.",
            score=0.5),
)  # fmt: skip


def events(text: str) -> list[dict]:
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


async def test_a_whole_answer_has_openais_shape(http):
    answer = (await http.post("/v1/chat/completions", json={"model": "m", "messages": MESSAGES})).json()
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{32}", answer.pop("id"))
    assert answer.pop("created") > 1_700_000_000
    assert answer == {
        "object": "chat.completion",
        "model": "m",
        "service_tier": "default",
        "system_fingerprint": None,
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "hello to you",
                    "refusal": None,
                    "annotations": [],
                },
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 7,
            "completion_tokens": 3,
            "total_tokens": 10,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    }


async def test_a_stream_is_role_then_one_event_per_delta_then_the_end(http):
    answer = await http.post(
        "/v1/chat/completions", json={"model": "m", "messages": MESSAGES, "stream": True}
    )
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    chunks = events(answer.text)
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": "", "refusal": None},
        {"content": "hello "},
        {"content": "to "},
        {"content": "you"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, None, "stop"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)
    assert answer.text.endswith("data: [DONE]\n\n")


async def test_the_last_comment_of_a_stream_has_the_complete_stages(http):
    answer = await http.post(
        "/v1/chat/completions", json={"model": "m", "messages": MESSAGES, "stream": True}
    )
    comment = answer.text.split("\n\n")[-3]
    assert re.fullmatch(r": server-timing auth;dur=[\d.]+, decode;dur=[\d.]+, other;dur=[\d.]+", comment)


async def test_the_official_client_reads_a_stream_with_usage(client):
    stream = await client.chat.completions.create(
        model="m", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "hello to you"
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert (chunks[-1].usage.total_tokens, chunks[-1].usage.prompt_tokens_details.cached_tokens) == (10, 2)


async def test_n_choices_keep_their_index_whole_and_streamed(client, gateway, play, say):
    def two(_call):
        left, right = say("first one", usage=False), say("second", choice=1)
        return play([left[0], right[0], *left[1:], *right[1:]])

    gateway.answer = two
    answer = await client.chat.completions.create(model="m", messages=MESSAGES, n=2)
    assert [choice.message.content for choice in answer.choices] == ["first one", "second"]
    stream = await client.chat.completions.create(model="m", messages=MESSAGES, n=2, stream=True)
    texts = ["", ""]
    async for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == ["first one", "second"]


def _calls(_call):
    pieces = [
        ToolCallDelta(index=0, id="call_1", name="weather"),
        ToolCallDelta(index=0, arguments='{"city":'),
        ToolCallDelta(index=0, arguments='"Oslo"}'),
        ToolCallDelta(index=1, id="call_2", name="time", arguments="{}"),
    ]
    return [TokenDelta(choice=0, tool_calls=(piece,)) for piece in pieces] + [
        TokenDelta(choice=0, finish_reason="tool_calls", usage=USAGE)
    ]


TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("weather", "time")
]


async def test_tool_calls_come_whole_with_null_content(client, gateway, play):
    gateway.answer = lambda call: play(_calls(call))
    answer = await client.chat.completions.create(model="m", messages=MESSAGES, tools=TOOLS)
    message = answer.choices[0].message
    assert message.content is None
    assert [(c.id, c.function.name, c.function.arguments) for c in message.tool_calls] == [
        ("call_1", "weather", '{"city":"Oslo"}'),
        ("call_2", "time", "{}"),
    ]
    assert answer.choices[0].finish_reason == "tool_calls"
    assert [tool.name for tool in gateway.calls[0].request.tools] == ["weather", "time"]
    assert gateway.calls[0].request.tool_choice.mode == "auto"


async def test_streamed_tool_calls_are_put_together_by_the_official_client(client, gateway, play):
    gateway.answer = lambda call: play(_calls(call))
    async with client.chat.completions.stream(model="m", messages=MESSAGES, tools=TOOLS) as stream:
        final = await stream.get_final_completion()
    calls = final.choices[0].message.tool_calls
    assert [(call.id, call.function.arguments) for call in calls] == [
        ("call_1", '{"city":"Oslo"}'),
        ("call_2", "{}"),
    ]


async def test_the_parse_helper_gets_an_instance_of_its_schema(client, gateway, play, say):
    class City(BaseModel):
        name: str
        people: int

    gateway.answer = lambda _call: play(say('{"name": "Oslo", "people": 700000}'))
    answer = await client.chat.completions.parse(model="m", messages=MESSAGES, response_format=City)
    assert answer.choices[0].message.parsed == City(name="Oslo", people=700000)
    asked = gateway.calls[0].request.response_format
    assert (asked.type, asked.name, sorted(asked.schema["properties"])) == (
        "json_schema",
        "City",
        ["name", "people"],
    )


async def test_logprobs_have_openais_shape_whole_and_streamed(client, gateway, play):
    token = TokenLogprob(token="é", logprob=-0.5, top=(("é", -0.5), ("e", -1.5)))  # noqa: S106
    gateway.answer = lambda _call: play(
        [
            TokenDelta(choice=0, text="é", logprobs=(token,)),
            TokenDelta(choice=0, finish_reason="length", usage=USAGE),
        ]
    )
    ask = {"model": "m", "messages": MESSAGES, "logprobs": True, "top_logprobs": 2}
    answer = await client.chat.completions.create(**ask)
    found = answer.choices[0].logprobs.content[0]
    assert (found.token, found.logprob, found.bytes) == ("é", -0.5, [195, 169])
    assert [(top.token, top.logprob) for top in found.top_logprobs] == [("é", -0.5), ("e", -1.5)]
    chunks = [chunk async for chunk in await client.chat.completions.create(**ask, stream=True)]
    assert chunks[1].choices[0].logprobs.content[0].bytes == [195, 169]
    assert chunks[1].choices[0].delta.content == "é"
    assert gateway.calls[0].request.sampling.top_logprobs == 2


async def test_markers_become_annotations_on_the_message(client, gateway, play, say):
    gateway.answer = lambda _call: play(say("Fish swim [1]. Whales do not [2]."), PASSAGES)
    answer = await client.chat.completions.create(
        model="m", messages=MESSAGES, extra_body={"retrieval": {"vector_store_ids": ["vs_1"]}}
    )
    message = answer.choices[0].message
    assert message.content == "Fish swim. Whales do not."
    found = [annotation.model_dump() for annotation in message.annotations]
    assert [(a["type"], a["file_id"], a["filename"], a["index"]) for a in found] == [
        ("file_citation", "file-1", "a.md", 9),
        ("file_citation", "file-2", "b.md", 24),
    ]
    assert (found[0]["chunk_id"], found[0]["vector_store_id"], found[0]["score"]) == ("c1", "vs_1", 0.9)
    assert gateway.calls[0].retrieval.vector_store_ids == ("vs_1",)


async def test_streamed_text_is_clean_and_the_last_chunk_has_the_annotations(client, gateway, play):
    texts = ["Fish", " swim", " [", "1", "]", ". Whales (sour", "ce 2) do", " not. [not one"]
    deltas = [TokenDelta(choice=0, text=text) for text in texts]
    gateway.answer = lambda _call: play(
        [*deltas, TokenDelta(choice=0, finish_reason="stop", usage=USAGE)], PASSAGES
    )
    stream = await client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == "Fish swim. Whales do not. [not one"
    annotations = chunks[-1].choices[0].delta.model_extra["annotations"]
    assert [(a["file_id"], a["index"]) for a in annotations] == [("file-1", 9), ("file-2", 17)]


async def test_headers_of_the_gateway_reach_the_client_whole_and_streamed(http, gateway, play, say):
    gateway.answer = lambda _call: play(say("x"), headers={"x-ratelimit-limit-requests": "60"})
    for stream in (False, True):
        answer = await http.post(
            "/v1/chat/completions", json={"model": "m", "messages": MESSAGES, "stream": stream}
        )
        assert answer.headers["x-ratelimit-limit-requests"] == "60"
        assert gateway.streams[-1].closed


async def test_an_error_before_the_first_token_is_a_real_status_also_for_a_stream(client, gateway):
    def overloaded(_call):
        raise Overloaded("the queue is too long", retry_after_s=2.2)

    gateway.answer = overloaded
    with pytest.raises(openai.RateLimitError) as caught:
        await client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
    assert caught.value.response.headers["retry-after"] == "3"
    assert caught.value.code == "overloaded"


async def test_errors_are_the_official_clients_exceptions(client, gateway):
    with pytest.raises(openai.NotFoundError) as absent:
        await client.chat.completions.create(model="absent", messages=MESSAGES)
    assert (absent.value.code, absent.value.param) == ("model_not_found", "model")

    def too_long(_call):
        raise ContextLengthExceeded("9000 tokens do not fit", "messages")

    gateway.answer = too_long
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="m", messages=MESSAGES)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        await client.with_options(api_key="sk-other").chat.completions.create(model="m", messages=MESSAGES)


async def test_an_error_in_a_started_stream_is_one_event_and_no_done(client, http, gateway, play, say):
    gateway.answer = lambda _call: play([*say("half an")[:2], EngineFailed("the engine died")])
    answer = await http.post(
        "/v1/chat/completions", json={"model": "m", "messages": MESSAGES, "stream": True}
    )
    assert answer.status_code == 200
    assert events(answer.text)[-1] == {
        "error": {
            "message": "the engine died",
            "type": "server_error",
            "param": None,
            "code": "engine_failed",
        }
    }
    assert "[DONE]" not in answer.text
    assert gateway.streams[0].closed
    with pytest.raises(openai.APIError, match="the engine died"):
        async for _ in await client.chat.completions.create(model="m", messages=MESSAGES, stream=True):
            pass


async def test_a_bug_in_a_started_stream_tells_the_client_nothing_of_itself(http, gateway, play, say):
    gateway.answer = lambda _call: play([*say("half an")[:2], RuntimeError("10.0.0.7 pid 4")])
    answer = await http.post(
        "/v1/chat/completions", json={"model": "m", "messages": MESSAGES, "stream": True}
    )
    assert events(answer.text)[-1]["error"]["message"] == "internal error"
    assert "10.0.0.7" not in answer.text
    assert "[DONE]" not in answer.text


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_stops_early_is_an_error_and_never_a_short_answer(
    http, gateway, play, say, stream
):
    gateway.answer = lambda _call: play(say("all of it")[:-1])
    answer = await http.post(
        "/v1/chat/completions", json={"model": "m", "messages": MESSAGES, "stream": stream}
    )
    last = events(answer.text)[-1] if stream else answer.json()
    assert last["error"]["code"] == "engine_failed"
    assert "[DONE]" not in answer.text
    assert answer.status_code == (200 if stream else 503)


async def test_a_client_that_leaves_a_stream_closes_it_at_once(raw_call, gateway, play, say, recorded):
    gateway.answer = lambda _call: play([*say("one two")[:1], asyncio.Event()])
    call = raw_call("/v1/chat/completions", {"model": "m", "messages": MESSAGES, "stream": True})
    await call.until(3)  # head, role, first word
    assert not gateway.streams[0].closed
    call.leave.set()
    await asyncio.wait_for(call.task, 1)
    assert gateway.streams[0].closed
    assert (
        "shoal_requests_total",
        {"route": "/v1/chat/completions", "model": "m", "status": "499"},
    ) in recorded


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_the_queue_cancels_the_wait(raw_call, gateway, recorded, stream):
    waiting, cancelled = asyncio.Event(), asyncio.Event()

    async def wait():
        waiting.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    gateway.answer = lambda _call: wait()
    call = raw_call("/v1/chat/completions", {"model": "m", "messages": MESSAGES, "stream": stream})
    await asyncio.wait_for(waiting.wait(), 1)
    call.leave.set()
    await asyncio.wait_for(call.task, 1)
    assert cancelled.is_set()
    assert recorded[0][1]["status"] == "499"


async def test_a_client_that_leaves_a_whole_answer_closes_its_stream(raw_call, gateway, play, say):
    blocked = asyncio.Event()
    gateway.answer = lambda _call: play([*say("one two")[:1], blocked])
    call = raw_call("/v1/chat/completions", {"model": "m", "messages": MESSAGES})
    while not gateway.streams:
        await asyncio.sleep(0)
    call.leave.set()
    await asyncio.wait_for(call.task, 1)
    assert gateway.streams[0].closed


async def test_a_cancelled_request_closes_its_stream_and_counts_as_left(
    raw_call, gateway, play, say, recorded
):
    gateway.answer = lambda _call: play([*say("one two")[:1], asyncio.Event()])
    call = raw_call("/v1/chat/completions", {"model": "m", "messages": MESSAGES, "stream": True})
    await call.until(3)
    call.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call.task
    assert gateway.streams[0].closed
    assert recorded[0][1]["status"] == "499"


async def test_the_request_becomes_the_gateways_call(client, gateway):
    await client.chat.completions.create(
        model="m",
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {
                "role": "assistant",
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
                ],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        ],
        tools=TOOLS,
        tool_choice={"type": "function", "function": {"name": "weather"}},
        parallel_tool_calls=False,
        max_completion_tokens=9,
        temperature=0.1,
        top_p=0.5,
        stop=["x", "y"],
        seed=3,
        presence_penalty=1,
        service_tier="flex",
        user="u",
        extra_headers={"x-request-timeout-ms": "1500"},
        extra_body={
            "retrieval": {
                "vector_store_ids": ["vs"],
                "max_num_results": 3,
                "filters": {"type": "eq", "key": "k", "value": "v"},
                "ranking_options": {"ranker": "bm25", "score_threshold": 0.2},
            }
        },
    )
    call = gateway.calls[0]
    assert (call.model, call.timeout_s, call.service_tier) == ("m", 1.5, PriorityClass.BATCH)
    request, sampling = call.request, call.request.sampling
    assert [message.role for message in request.messages] == ["system", "user", "assistant", "tool"]
    assert request.messages[1].content == "a\nb"
    assert request.messages[2].tool_calls[0].name == "weather"
    assert (request.tool_choice.mode, request.tool_choice.function) == ("function", "weather")
    assert request.parallel_tool_calls is False
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (9, 0.1, 0.5)
    assert (sampling.stop, sampling.seed, sampling.presence_penalty) == (("x", "y"), 3, 1.0)
    options = call.retrieval
    assert (options.max_num_results, options.ranker, options.score_threshold) == (3, "bm25", 0.2)
    assert options.filters == {"type": "eq", "key": "k", "value": "v"}


@pytest.mark.parametrize("value", ["0", "-5", "1.5", "soon", "9999999999"])
async def test_a_bad_timeout_header_is_refused(http, value):
    answer = await http.post(
        "/v1/chat/completions",
        json={"model": "m", "messages": MESSAGES},
        headers={"x-request-timeout-ms": value},
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "x-request-timeout-ms"


async def test_a_key_without_the_scope_may_not_generate(client, gateway):
    gateway.principal = type(gateway.principal)(tenant="t1", scopes=("documents",))
    with pytest.raises(openai.PermissionDeniedError, match="lacks the scope 'inference'"):
        await client.chat.completions.create(model="m", messages=MESSAGES)


async def test_a_strangers_body_is_not_read(raw_call):
    call = raw_call("/v1/chat/completions", headers=[(b"authorization", b"x")], chunks=[b"{", b"never"])
    call.scope["headers"] = [pair for pair in call.scope["headers"] if pair[0] != b"authorization"]
    await asyncio.wait_for(call.task, 1)
    assert call.status == 401
    assert call.headers["www-authenticate"] == "Bearer"
    assert len(call._chunks) == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_a_choice_without_an_end_is_an_error_though_the_tokens_were_counted(
    http, gateway, play, say, stream
):
    gateway.answer = lambda _call: play([*say("never ends", usage=False)[:-1], *say("ends", choice=1)])
    answer = await http.post(
        "/v1/chat/completions", json={"model": "m", "messages": MESSAGES, "n": 2, "stream": stream}
    )
    last = events(answer.text)[-1] if stream else answer.json()
    assert last["error"]["code"] == "engine_failed"


@pytest.mark.parametrize("stream", [False, True])
async def test_text_held_back_as_a_possible_marker_comes_with_the_end(http, gateway, play, say, stream):
    gateway.answer = lambda _call: play(say("an open [1"), PASSAGES)
    answer = await http.post(
        "/v1/chat/completions", json={"model": "m", "messages": MESSAGES, "stream": stream}
    )
    if stream:
        deltas = [chunk["choices"][0]["delta"] for chunk in events(answer.text)]
        assert deltas[-1]["content"] == " [1"
        text = "".join(delta.get("content", "") for delta in deltas)
    else:
        text = answer.json()["choices"][0]["message"]["content"]
    assert text == "an open [1"
