"""What every engine guarantees of an answer that goes on behind what another one began (`GenerationRequest.progress`).

An answer is cut between two deltas, as the death of a replica cuts it, and continued: together both parts must be
the undisturbed answer.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from itertools import groupby
from typing import Any

import pytest

from actors.errors import CannotResume, Conflict
from actors.types import (
    GenerationRequest,
    Message,
    Progress,
    ResponseFormat,
    SamplingParams,
    TokenDelta,
    Tool,
    ToolChoice,
)

from .conftest import RunningEngine
from .engine_answers import LONG, Answer, chat, collect, joined, next_id, stream_of, until_idle

pytestmark = pytest.mark.asyncio(loop_scope="module")

SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "warm": {"type": "boolean"}},
    "required": ["colour", "warm"],
    "additionalProperties": False,
}
JAPAN = "日本" * 10  # repeated by any model, and split within its characters by those that know little of it


def told(deltas: Sequence[TokenDelta], request: GenerationRequest) -> tuple[Progress, ...]:
    """What the reader of these deltas has."""
    return tuple(_told(deltas, request, choice) for choice in range(request.sampling.n))


def _told(deltas: Sequence[TokenDelta], request: GenerationRequest, choice: int) -> Progress:
    own = [delta for delta in deltas if delta.choice == choice]
    echo = len(request.prompt or "") if request.echo and own else 0
    return Progress(
        token_ids=tuple(token for delta in own for token in delta.token_ids),
        text_chars=sum(len(delta.text) for delta in own) - echo,
        finish_reason=own[-1].finish_reason if own else None,
    )


def continued(request: GenerationRequest, progress: tuple[Progress, ...]) -> GenerationRequest:
    return replace(request, request_id=next_id(), progress=progress)


async def deltas_of(running: RunningEngine, request: GenerationRequest) -> list[TokenDelta]:
    return [delta async for delta in running.engine.generate(request)]


def places(count: int) -> list[int]:
    """Where to cut `count` deltas."""
    return sorted({0, 1, 2, count // 3, count // 2, count - 2, count - 1} & set(range(count)))


def same(found: Answer, whole: Answer) -> None:
    """Byte for byte, but for what no second run shares: numbers of logprobs and the ids of tool calls."""
    assert found.choices.keys() == whole.choices.keys()
    for index, choice in whole.choices.items():
        other = found.choices[index]
        assert other.text == choice.text
        assert other.token_ids == choice.token_ids
        assert other.finish_reason == choice.finish_reason
        assert [entry.token for entry in other.logprobs] == [entry.token for entry in choice.logprobs]
        assert _calls(other.calls) == _calls(choice.calls)
    assert found.usage.prompt_tokens == whole.usage.prompt_tokens
    assert found.usage.completion_tokens == whole.usage.completion_tokens


def _calls(pieces: Sequence[Any]) -> list[tuple[int, list[str | None], str]]:
    """Index, names and arguments of each call."""
    return [
        (index, [piece.name for piece in of if piece.name], "".join(piece.arguments for piece in of))
        for index, of in ((index, list(group)) for index, group in groupby(pieces, lambda piece: piece.index))
    ]


async def goes_on_everywhere(
    running: RunningEngine, request: GenerationRequest, *, cuts: int | None = None
) -> Answer:
    """Cut `request`'s answer at the first `cuts` places, or at some; returns it whole."""
    deltas = await deltas_of(running, request)
    whole = joined(deltas)
    for cut in range(1, min(cuts, len(deltas))) if cuts else places(len(deltas)):
        begun = deltas[:cut]
        rest = await deltas_of(running, continued(request, told(begun, request)))
        same(joined([*begun, *rest]), whole)
    return whole


async def test_an_answer_goes_on_from_the_exact_token(running: RunningEngine) -> None:
    whole = await goes_on_everywhere(running, chat("What is the capital of France?", max_tokens=24))
    assert whole.only.finish_reason == "stop"


async def test_max_tokens_counts_over_both_attempts(running: RunningEngine) -> None:
    whole = await goes_on_everywhere(running, chat(LONG, max_tokens=12))
    assert whole.only.finish_reason == "length"
    assert whole.usage.completion_tokens == 12


async def test_characters_of_several_bytes_survive_a_cut_anywhere(running: RunningEngine) -> None:
    request = GenerationRequest(
        request_id=next_id(), prompt=JAPAN, sampling=SamplingParams(max_tokens=24, temperature=0.0)
    )
    whole = await goes_on_everywhere(running, request, cuts=24)
    assert not whole.only.text.isascii()


async def test_logprobs_go_on_one_per_token(running: RunningEngine) -> None:
    request = GenerationRequest(
        request_id=next_id(),
        prompt=JAPAN,
        sampling=SamplingParams(max_tokens=12, temperature=0.0, logprobs=True, top_logprobs=2),
    )
    whole = await goes_on_everywhere(running, request, cuts=12)
    assert len(whole.only.logprobs) == len(whole.only.token_ids)


async def test_a_stop_string_is_found_across_the_cut(running: RunningEngine) -> None:
    whole = (await collect(running, chat(LONG, max_tokens=24))).only.text
    stop = whole[len(whole) // 2 :][:8]
    stopped = await goes_on_everywhere(running, chat(LONG, max_tokens=24, stop=(stop,)), cuts=12)
    assert stopped.only.finish_reason == "stop"
    assert stopped.only.text == whole[: whole.index(stop)]


async def test_text_that_a_stop_string_held_back_comes_after_the_cut(running: RunningEngine) -> None:
    request = chat(LONG, max_tokens=12, stop=("no such words are ever said",))
    whole = await goes_on_everywhere(running, request)
    assert whole.only.finish_reason == "length"


async def test_tokens_without_their_text_are_told_with_the_next_delta(running: RunningEngine) -> None:
    request = chat(LONG, max_tokens=12)
    deltas = await deltas_of(running, request)
    (begun,) = told(deltas[:6], request)
    rest = joined(await deltas_of(running, continued(request, (replace(begun, text_chars=2),))))
    assert rest.only.text == joined(deltas).only.text[2:]


async def test_an_echo_does_not_come_again(running: RunningEngine) -> None:
    request = GenerationRequest(
        request_id=next_id(),
        prompt="Once upon a time",
        sampling=SamplingParams(max_tokens=6, temperature=0.0),
        echo=True,
    )
    whole = await goes_on_everywhere(running, request)
    assert whole.only.text.startswith("Once upon a time")


@pytest.mark.parametrize("max_tokens", [5, 24])
async def test_with_every_token_told_only_the_end_comes(running: RunningEngine, max_tokens: int) -> None:
    request = chat("What is the capital of France?", max_tokens=max_tokens)
    whole = joined(await deltas_of(running, request))
    begun = Progress(token_ids=tuple(whole.only.token_ids), text_chars=len(whole.only.text))
    rest = await deltas_of(running, continued(request, (begun,)))
    assert [delta.token_ids for delta in rest] == [()]
    assert joined(rest).only.text == ""
    assert joined(rest).only.finish_reason == whole.only.finish_reason
    assert joined(rest).usage.completion_tokens == whole.usage.completion_tokens
    await until_idle(running)


async def test_after_the_end_only_the_usage_comes(running: RunningEngine) -> None:
    request = chat(LONG, max_tokens=5)
    deltas = await deltas_of(running, request)
    (rest,) = await deltas_of(running, continued(request, told(deltas, request)))
    assert (rest.text, rest.token_ids, rest.finish_reason) == ("", (), None)
    assert rest.usage is not None
    assert rest.usage.completion_tokens == 5


async def test_progress_without_a_token_is_a_beginning(running: RunningEngine) -> None:
    request = chat("Tell me about the sea.", n=2, temperature=1.0)
    answer = await collect(running, continued(request, (Progress(), Progress())))
    assert sorted(answer.choices) == [0, 1]


async def test_choices_go_on_each_from_its_own_token(running: RunningEngine) -> None:
    await goes_on_everywhere(running, chat(LONG, max_tokens=8, n=2))


async def test_a_choice_that_has_ended_stays_so(running: RunningEngine) -> None:
    request = chat(LONG, max_tokens=8, n=2)
    whole = joined(deltas := await deltas_of(running, request))
    begun = [delta for delta in deltas if delta.choice == 1]
    begun[-1] = replace_usage(begun[-1])
    rest = await deltas_of(running, continued(request, told(begun, request)))
    assert {delta.choice for delta in rest} == {0}
    same(joined([*begun, *rest]), whole)


def replace_usage(delta: TokenDelta) -> TokenDelta:
    return TokenDelta(delta.choice, delta.text, delta.token_ids, finish_reason=delta.finish_reason)


async def test_structured_output_goes_on(running: RunningEngine) -> None:
    wanted = ResponseFormat(type="json_schema", schema=SCHEMA)
    request = chat("Is it red?", response_format=wanted, max_tokens=64)
    whole = await goes_on_everywhere(running, request)
    assert json.loads(whole.only.text)["colour"] in {"red", "green"}


@pytest.mark.parametrize(
    "choice", [ToolChoice(mode="function", function="paint"), ToolChoice(mode="required")]
)
async def test_a_demanded_call_goes_on(running: RunningEngine, choice: ToolChoice) -> None:
    request = GenerationRequest(
        request_id=next_id(),
        messages=(Message(role="user", content="Paint it red."),),
        tools=(Tool(name="paint", parameters=SCHEMA),),
        tool_choice=choice,
        parallel_tool_calls=False,
        sampling=SamplingParams(temperature=0.0, max_tokens=64),
    )
    whole = await goes_on_everywhere(running, request)
    assert whole.only.finish_reason == "tool_calls"
    assert "".join(piece.arguments for piece in whole.only.calls).startswith("{")


async def test_a_seeded_sample_goes_on_behind_what_was_said(running: RunningEngine) -> None:
    request = chat(LONG, max_tokens=12, temperature=1.0, seed=3)
    deltas = await deltas_of(running, request)
    rest = [await deltas_of(running, continued(request, told(deltas[:4], request))) for _ in range(2)]
    first, second = (joined([*deltas[:4], *part]) for part in rest)
    assert first.only == second.only
    assert len(first.only.token_ids) == first.usage.completion_tokens


@pytest.mark.parametrize(
    "progress",
    [
        (Progress(token_ids=(1, 2), text_chars=1), Progress()),
        (Progress(token_ids=(2**31,), text_chars=1),),
        (Progress(token_ids=(51,) * 40, text_chars=40),),
        (Progress(token_ids=(51,), text_chars=500),),
    ],
    ids=["choices", "vocabulary", "beyond max_tokens", "more text than tokens"],
)
async def test_progress_of_another_answer_is_refused(
    running: RunningEngine, progress: tuple[Progress, ...]
) -> None:
    with pytest.raises(CannotResume):
        await deltas_of(running, continued(chat("Hello.", max_tokens=16), progress))
    await until_idle(running)


async def test_a_continued_request_is_a_request_like_any_other(running: RunningEngine) -> None:
    request = chat(LONG, max_tokens=200)
    begun: list[TokenDelta] = []
    async with aclosing(stream_of(running, request)) as stream:
        async for delta in stream:
            begun.append(delta)
            if len(begun) == 5:
                break
        with pytest.raises(Conflict):
            await deltas_of(running, replace(request, progress=told(begun, request)))
    await until_idle(running)
    again = replace(request, progress=told(begun, request))
    task = asyncio.create_task(deltas_of(running, again))
    async with asyncio.timeout(10 * running.step_bound_s):
        while not running.engine.stats().running:
            await asyncio.sleep(0.005)
    await running.engine.abort(request.request_id)
    assert all(delta.usage is None for delta in await task)
    await until_idle(running)
    assert running.engine.stats().kv_usage == 0.0


async def test_stats_count_new_tokens_only(running: RunningEngine) -> None:
    request = chat(LONG, max_tokens=12)
    deltas = await deltas_of(running, request)
    await until_idle(running)
    before = running.engine.stats()
    told_tokens = sum(len(delta.token_ids) for delta in deltas[:4])  # an engine in a hurry merges steps
    usage = joined(
        [*deltas[:4], *await deltas_of(running, continued(request, told(deltas[:4], request)))]
    ).usage
    await until_idle(running)
    after = running.engine.stats()
    assert after.output_tokens_total - before.output_tokens_total == 12 - told_tokens
    assert after.prompt_tokens_total - before.prompt_tokens_total == usage.prompt_tokens + told_tokens
