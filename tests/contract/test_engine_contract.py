"""What every engine guarantees, whatever model it runs (`actors/engines/protocol.py`).

The suite asserts nothing about what a model says: answers are compared with each other or with the request.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing

import pytest

from actors.errors import ContextLengthExceeded, InvalidRequest
from actors.types import GenerationRequest, ResponseFormat, SamplingParams, TokenDelta

from .conftest import RunningEngine
from .engine_answers import LONG, chat, collect, next_id, stream_of, until_idle

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_usage_counts_exactly_the_tokens_that_were_streamed(running: RunningEngine) -> None:
    answer = await collect(running, chat("Say something short."))
    assert answer.usage.completion_tokens == len(answer.only.token_ids)
    assert answer.usage.prompt_tokens > 0
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + len(answer.only.token_ids)
    assert answer.only.text


async def test_a_greedy_request_gives_the_same_tokens_twice(running: RunningEngine) -> None:
    first = await collect(running, chat("What is the capital of France?"))
    second = await collect(running, chat("What is the capital of France?"))
    assert first.only == second.only
    assert first.usage.prompt_tokens == second.usage.prompt_tokens


async def test_max_tokens_ends_a_choice_with_length(running: RunningEngine) -> None:
    answer = await collect(running, chat(LONG, max_tokens=5))
    assert answer.only.finish_reason == "length"
    assert answer.usage.completion_tokens == 5


async def test_a_shorter_answer_is_a_prefix_of_the_longer_one(running: RunningEngine) -> None:
    short = await collect(running, chat(LONG, max_tokens=4))
    long = await collect(running, chat(LONG, max_tokens=12))
    assert long.only.token_ids[:4] == short.only.token_ids
    assert long.only.text.startswith(short.only.text.rstrip("\N{REPLACEMENT CHARACTER}"))


async def test_a_stop_string_ends_the_choice_and_is_not_in_the_text(running: RunningEngine) -> None:
    whole = (await collect(running, chat(LONG, max_tokens=24))).only.text
    middle = len(whole) // 2
    stop = whole[middle : middle + 3]
    stopped = await collect(running, chat(LONG, max_tokens=24, stop=(stop,)))
    assert stopped.only.finish_reason == "stop"
    assert stopped.only.text == whole[: whole.index(stop)]
    assert stopped.usage.completion_tokens == len(stopped.only.token_ids)


async def test_no_part_of_a_stop_string_is_ever_streamed(running: RunningEngine) -> None:
    whole = (await collect(running, chat(LONG, max_tokens=24))).only.text
    stop = whole[len(whole) // 2 :][:8]
    streamed = ""
    async for delta in running.engine.generate(chat(LONG, max_tokens=24, stop=(stop,))):
        streamed += delta.text
        assert whole[: whole.index(stop)].startswith(streamed)


async def test_n_choices_each_end_and_usage_covers_them_all(running: RunningEngine) -> None:
    answer = await collect(running, chat("Tell me about the sea.", n=3, temperature=1.0, seed=7))
    assert sorted(answer.choices) == [0, 1, 2]
    assert answer.usage.completion_tokens == sum(len(c.token_ids) for c in answer.choices.values())
    single = await collect(running, chat("Tell me about the sea."))
    assert answer.usage.prompt_tokens == single.usage.prompt_tokens


async def test_logprobs_come_one_per_token_with_sorted_alternatives(running: RunningEngine) -> None:
    answer = await collect(running, chat("Name a colour.", logprobs=True, top_logprobs=3))
    assert len(answer.only.logprobs) == len(answer.only.token_ids)
    for entry in answer.only.logprobs:
        values = [value for _, value in entry.top]
        assert len(values) >= 3
        assert values == sorted(values, reverse=True)
        assert entry.logprob <= 0.0
        assert max(values) <= 0.0


async def test_without_logprobs_none_are_sent(running: RunningEngine) -> None:
    assert (await collect(running, chat("Name a colour."))).only.logprobs == []


async def test_an_answer_with_a_json_schema_is_valid_against_it(running: RunningEngine) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green"]}, "warm": {"type": "boolean"}},
        "required": ["colour", "warm"],
        "additionalProperties": False,
    }
    wanted = ResponseFormat(type="json_schema", schema=schema)
    answer = await collect(running, chat("Is it red?", response_format=wanted, max_tokens=64))
    assert answer.only.finish_reason == "stop"
    value = json.loads(answer.only.text)
    assert value["colour"] in {"red", "green"}
    assert isinstance(value["warm"], bool)
    assert set(value) == {"colour", "warm"}


async def test_a_schema_that_is_none_is_refused(running: RunningEngine) -> None:
    broken = ResponseFormat(type="json_schema", schema={"type": "no-such-type"})
    with pytest.raises(InvalidRequest):
        await collect(running, chat("Anything.", response_format=broken))


async def test_a_completion_continues_a_plain_prompt(running: RunningEngine) -> None:
    request = GenerationRequest(
        request_id=next_id(),
        prompt="Once upon a time",
        sampling=SamplingParams(max_tokens=6, temperature=0.0),
    )
    answer = await collect(running, request)
    assert 0 < answer.usage.completion_tokens <= 6
    assert answer.usage.completion_tokens == len(answer.only.token_ids)


async def test_echo_returns_the_prompt_before_the_completion(running: RunningEngine) -> None:
    def request(*, echo: bool) -> GenerationRequest:
        return GenerationRequest(
            request_id=next_id(),
            prompt="Once upon a time",
            sampling=SamplingParams(max_tokens=6, temperature=0.0),
            echo=echo,
        )

    plain = await collect(running, request(echo=False))
    echoed = await collect(running, request(echo=True))
    assert echoed.only.text == "Once upon a time" + plain.only.text
    assert echoed.usage == plain.usage


async def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(running: RunningEngine) -> None:
    limit = running.card.context_tokens
    with pytest.raises(ContextLengthExceeded, match=str(limit)):
        await collect(running, chat("word " * (2 * limit)))
    await until_idle(running)


async def test_max_tokens_beyond_the_context_is_refused(running: RunningEngine) -> None:
    limit = running.card.context_tokens
    with pytest.raises(ContextLengthExceeded, match=str(limit)):
        await collect(running, chat("Hello.", max_tokens=limit))


async def test_requests_run_side_by_side_and_leave_nothing_behind(running: RunningEngine) -> None:
    before = running.engine.stats()
    answers = await asyncio.gather(*(collect(running, chat(f"Story {i}")) for i in range(5)))
    await until_idle(running)
    after = running.engine.stats()
    assert after.running == after.waiting == 0
    assert after.kv_usage == 0.0
    produced = sum(answer.usage.completion_tokens for answer in answers)
    assert after.output_tokens_total - before.output_tokens_total == produced
    prompts = sum(answer.usage.prompt_tokens for answer in answers)
    assert after.prompt_tokens_total - before.prompt_tokens_total == prompts


async def test_stats_show_a_running_request(running: RunningEngine) -> None:
    async with aclosing(stream_of(running, chat(LONG, max_tokens=128))) as stream:
        await anext(stream)
        stats = running.engine.stats()
        assert stats.running == 1
        assert 0.0 < stats.kv_usage <= 1.0
    await until_idle(running)


async def test_abort_ends_the_stream_and_frees_its_slot(running: RunningEngine) -> None:
    request = chat(LONG, max_tokens=256)
    seen: list[TokenDelta] = []

    async def consume() -> None:
        seen.extend([delta async for delta in running.engine.generate(request)])

    consumer = asyncio.create_task(consume())
    async with asyncio.timeout(10 * running.step_bound_s):
        while not running.engine.stats().running:
            await asyncio.sleep(0.005)
    await running.engine.abort(request.request_id)
    async with asyncio.timeout(running.step_bound_s):
        await consumer
    assert all(delta.usage is None for delta in seen)
    await until_idle(running)


async def test_closing_the_iterator_frees_its_slot(running: RunningEngine) -> None:
    stream = stream_of(running, chat(LONG, max_tokens=256))
    await anext(stream)
    await stream.aclose()
    await until_idle(running)


async def test_a_cancelled_consumer_frees_its_slot(running: RunningEngine) -> None:
    consumer = asyncio.create_task(collect(running, chat(LONG, max_tokens=256)))
    async with asyncio.timeout(10 * running.step_bound_s):
        while not running.engine.stats().running:
            await asyncio.sleep(0.005)
    consumer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await consumer
    await until_idle(running)


async def test_the_place_of_an_aborted_request_is_free_within_a_step(running: RunningEngine) -> None:
    """Counted in the tokens of a neighbour: one for the step in progress, one for the step that lets the next in."""
    capacity = running.engine.capacity.max_sequences
    requests = [chat(LONG, max_tokens=400, temperature=1.0, seed=number) for number in range(capacity + 1)]
    counts = dict.fromkeys((request.request_id for request in requests), 0)

    async def consume(request: GenerationRequest) -> None:
        async for delta in running.engine.generate(request):
            counts[request.request_id] += len(delta.token_ids)

    tasks = [asyncio.create_task(consume(request)) for request in requests]
    neighbour, victim, waiting = (requests[at].request_id for at in (0, 1, -1))
    async with asyncio.timeout(10 * running.step_bound_s):
        while not all(counts[request.request_id] for request in requests[:-1]):
            await asyncio.sleep(0.001)
        assert counts[waiting] == 0
        before = counts[neighbour]
        await running.engine.abort(victim)
        while not counts[waiting]:
            await asyncio.sleep(0.001)
    assert counts[neighbour] - before <= 3
    for request in requests:
        await running.engine.abort(request.request_id)
    await asyncio.gather(*tasks)
    await until_idle(running)


async def test_aborting_an_unknown_request_is_ignored(running: RunningEngine) -> None:
    await running.engine.abort("never-seen")


async def test_a_healthy_engine_says_so_idle_and_at_work(running: RunningEngine) -> None:
    await running.engine.check_health()
    async with aclosing(stream_of(running, chat(LONG, max_tokens=128))) as stream:
        await anext(stream)
        await running.engine.check_health()


async def test_the_capacity_holds_at_least_one_full_context(running: RunningEngine) -> None:
    capacity = running.engine.capacity
    assert capacity.max_sequences >= 1
    assert capacity.kv_tokens >= running.card.context_tokens
