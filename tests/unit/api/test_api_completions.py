from __future__ import annotations

import asyncio
import json

import openai
import pytest

from actors.errors import Overloaded
from actors.types import TokenDelta, TokenLogprob, Usage


async def test_a_completion_has_the_legacy_shape(client, gateway):
    answer = await client.completions.create(model="m", prompt="once", stop="x", seed=1)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    choice = answer.choices[0]
    assert (choice.text, choice.index, choice.finish_reason, choice.logprobs) == (
        "hello to you",
        0,
        "stop",
        None,
    )
    assert answer.usage.total_tokens == 10
    request = gateway.calls[0].request
    assert (request.prompt, request.messages, request.sampling.max_tokens) == ("once", None, 16)


async def test_a_completion_streams_one_event_per_delta(client):
    stream = await client.completions.create(
        model="m", prompt="once", stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert [chunk.choices[0].text for chunk in chunks[:-1]] == ["hello ", "to ", "you", ""]
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 3)


async def test_token_ids_go_to_the_engine_as_they_are(client, gateway):
    await client.completions.create(model="m", prompt=[5, 6, 7])
    assert gateway.calls[0].request.prompt_token_ids == (5, 6, 7)
    assert gateway.calls[0].request.prompt is None


def _named(play, say):
    def answer(call):
        deltas = say(f"re {call.request.prompt}", usage=False)[:-1]
        usage = Usage(prompt_tokens=2, completion_tokens=3, cached_tokens=1)
        ends = [TokenDelta(choice=i, finish_reason="stop", usage=usage if i else None) for i in range(2)]
        return play([*deltas, TokenDelta(choice=1, text=f"second {call.request.prompt}"), *ends])

    return answer


async def test_several_prompts_number_their_choices_across_and_sum_their_usage(client, gateway, play, say):
    gateway.answer = _named(play, say)
    answer = await client.completions.create(model="m", prompt=["a", "b", "c"], n=2)
    assert [choice.text for choice in answer.choices] == [
        "re a",
        "second a",
        "re b",
        "second b",
        "re c",
        "second c",
    ]
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        6,
        9,
        15,
    )
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert len({call.request.request_id for call in gateway.calls}) == 3
    assert all(stream.closed for stream in gateway.streams)


async def test_several_prompts_stream_side_by_side(client, gateway, play, say):
    gateway.answer = _named(play, say)
    stream = await client.completions.create(
        model="m", prompt=["a", "b"], n=2, stream=True, stream_options={"include_usage": True}
    )
    texts: dict[int, str] = {}
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
    assert texts == {0: "re a", 1: "second a", 2: "re b", 3: "second b"}
    assert chunk.usage.total_tokens == 10


async def test_prompts_are_started_at_once_and_not_one_after_the_other(client, gateway, play, say):
    meet = asyncio.Barrier(3)

    async def wait_for_all(_call):
        await asyncio.wait_for(meet.wait(), 2)
        return play(say("ok"))

    gateway.answer = wait_for_all
    answer = await client.completions.create(model="m", prompt=["a", "b", "c"])
    assert len(answer.choices) == 3


async def test_when_one_prompt_is_refused_what_the_others_opened_is_closed(client, gateway, play, say):
    async def last_fails(call):
        if call.request.prompt == "b":
            await asyncio.sleep(0.01)
            raise Overloaded("full", retry_after_s=1)
        return play(say("ok"))

    gateway.answer = last_fails
    with pytest.raises(openai.RateLimitError):
        await client.completions.create(model="m", prompt=["a", "b"])
    assert [stream.closed for stream in gateway.streams] == [1]


async def test_a_client_that_leaves_stops_all_prompts(raw_call, gateway, play, say):
    gateway.answer = lambda _call: play([*say("one two")[:1], asyncio.Event()])
    call = raw_call("/v1/completions", {"model": "m", "prompt": ["a", "b"], "stream": True})
    await call.until(4)  # head, opening, a word of each
    call.leave.set()
    await asyncio.wait_for(call.task, 1)
    assert [bool(stream.closed) for stream in gateway.streams] == [True, True]


async def test_a_failure_of_one_prompt_ends_the_stream_with_its_error(http, gateway, play, say):
    def one_breaks(call):
        bad = call.request.prompt == "b"
        return play([*say("x y")[:1], RuntimeError("secret")] if bad else say("fine"))

    gateway.answer = one_breaks
    answer = await http.post("/v1/completions", json={"model": "m", "prompt": ["a", "b"], "stream": True})
    last = json.loads(answer.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["message"] == "internal error"
    assert "[DONE]" not in answer.text


async def test_legacy_logprobs_are_parallel_lists_with_offsets(client, gateway, play):
    tokens = [TokenLogprob(token=text, logprob=-1.0, top=((text, -1.0),)) for text in ("ab", "c", "d")]
    usage = Usage(prompt_tokens=1, completion_tokens=3)
    gateway.answer = lambda _call: play(
        [
            TokenDelta(choice=0, text="abc", logprobs=tuple(tokens[:2])),
            TokenDelta(choice=0, text="d", logprobs=tuple(tokens[2:]), finish_reason="length", usage=usage),
        ]
    )
    answer = await client.completions.create(model="m", prompt="x", logprobs=1)
    found = answer.choices[0].logprobs
    assert (found.tokens, found.text_offset) == (["ab", "c", "d"], [0, 2, 3])
    assert (found.token_logprobs, found.top_logprobs[0]) == ([-1.0] * 3, {"ab": -1.0})
    stream = await client.completions.create(model="m", prompt="x", logprobs=1, stream=True)
    offsets = [chunk.choices[0].logprobs.text_offset async for chunk in stream]
    assert offsets == [[0, 2], [3]]


async def test_echo_is_asked_of_the_engine(client, gateway):
    await client.completions.create(model="m", prompt="x", echo=True)
    assert gateway.calls[0].request.echo


@pytest.mark.parametrize(
    ("extra", "param", "words"),
    [
        ({"suffix": "end"}, "suffix", "fills in the middle"),
        ({"best_of": 3}, "best_of", "equals 'n'"),
        ({"echo": True, "logprobs": 1}, "logprobs", "log probabilities"),
        ({"logprobs": 6}, "logprobs", "5"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": ["a", ""]}, "prompt[1]", "empty"),
        ({"prompt": ["a", [1]]}, "prompt", "mixed"),
        ({"prompt": []}, "prompt", "non-empty"),
        ({"prompt": [[1], [True]]}, "prompt[1]", "token ids"),
        ({"prompt": {"a": 1}}, "prompt", "list of token ids"),
        ({"prompt": ["x"] * 65}, "prompt", "64"),
        ({"messages": []}, "messages", "allowed: best_of, echo"),
    ],
)
async def test_bad_completion_input_names_the_field_and_what_is_allowed(http, extra, param, words):
    answer = await http.post("/v1/completions", json={"model": "m", "prompt": "x", **extra})
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["param"] == param
    assert words in error["message"]
