"""Pace, batching and limits of the scripted engine; what all engines share is in the contract suite.

Times are checked from below exactly and from above loosely: the machine may be busy.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from actors.engines import scripted_tokenizer as tokenizer
from actors.engines.scripted import ScriptedConfig, ScriptedEngine
from actors.engines.tokens import prompt_tokens
from actors.errors import Conflict, ContextLengthExceeded, EngineFailed, InvalidRequest
from actors.types import GenerationRequest, Message, ModelCard, Progress, SamplingParams, TokenDelta, Tool

_ids = itertools.count()
SLACK_S = 0.4
FREE = {"itl_base_s": 0.0, "itl_per_sequence_s": 0.0, "prefill_tokens_per_s": None}
Start = Callable[..., Awaitable[ScriptedEngine]]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    engines: list[ScriptedEngine] = []

    async def build(**config: Any) -> ScriptedEngine:
        engine = ScriptedEngine("model", ScriptedConfig(**config))
        engines.append(engine)
        await engine.start()
        return engine

    yield build
    for engine in engines:
        await engine.stop()


def ask(text: str = "One two three four", **sampling: Any) -> GenerationRequest:
    return GenerationRequest(
        request_id=f"r{next(_ids)}",
        messages=(Message(role="user", content=text),),
        sampling=SamplingParams(**sampling),
    )


async def run(engine: ScriptedEngine, request: GenerationRequest) -> list[TokenDelta]:
    return [delta async for delta in engine.generate(request)]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0)


async def timed(work: Awaitable[Any]) -> float:
    started = time.monotonic()
    await work
    return time.monotonic() - started


async def test_tokens_come_at_the_pace_of_the_curve_without_drift(start: Start) -> None:
    engine = await start(itl_base_s=0.01, itl_per_sequence_s=0.0, prefill_tokens_per_s=None, output_tokens=50)
    took_s = await timed(run(engine, ask()))
    assert 0.5 <= took_s <= 0.5 + SLACK_S


async def test_a_fuller_batch_is_slower(start: Start) -> None:
    engine = await start(
        itl_base_s=0.0, itl_per_sequence_s=0.002, prefill_tokens_per_s=None, output_tokens=10
    )
    alone = await timed(run(engine, ask()))
    together = await timed(asyncio.gather(*(run(engine, ask()) for _ in range(10))))
    assert alone >= 10 * 0.002
    assert together >= 10 * 10 * 0.002


async def test_the_first_token_waits_for_the_prefill(start: Start) -> None:
    engine = await start(itl_base_s=0.0, itl_per_sequence_s=0.0, prefill_tokens_per_s=1000.0)
    request = ask("word " * 50, max_tokens=1)
    took_s = await timed(run(engine, request))
    tokens = engine.stats().prompt_tokens_total
    assert tokens > 100
    assert tokens / 1000 <= took_s <= tokens / 1000 + SLACK_S


async def test_all_deltas_of_a_step_are_delivered_together(start: Start) -> None:
    engine = await start(**FREE, output_tokens=20)
    seen: list[list[int]] = []

    async def consume() -> None:
        seen.append([engine.stats().output_tokens_total async for _ in engine.generate(ask())])

    await asyncio.gather(*(consume() for _ in range(4)))
    assert seen == [[4 * step for step in range(1, 21)]] * 4


async def test_an_idle_engine_is_parked(start: Start) -> None:
    engine = await start()
    await run(engine, ask())
    await asyncio.sleep(0.02)
    timers = [timer for timer in asyncio.get_running_loop()._scheduled if not timer.cancelled()]
    assert timers == []


async def test_requests_beyond_the_batch_wait_their_turn_in_order(start: Start) -> None:
    engine = await start(max_sequences=2, output_tokens=4, itl_base_s=0.005)
    done: list[int] = []

    async def one(number: int) -> None:
        await run(engine, ask())
        done.append(number)

    tasks = [asyncio.create_task(one(number)) for number in range(6)]
    await until(lambda: engine.stats().running == 2)
    assert engine.stats().waiting == 4
    await asyncio.gather(*tasks)
    assert done == sorted(done)


async def test_the_kv_cache_limits_the_batch_like_the_slots_do(start: Start) -> None:
    engine = await start(context_tokens=64, kv_tokens=90, output_tokens=40, itl_base_s=0.002)
    tasks = [asyncio.create_task(run(engine, ask())) for _ in range(2)]
    await until(lambda: engine.stats().running > 0)
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (1, 1)
    assert 0 < stats.kv_usage <= 0.6
    await asyncio.gather(*tasks)
    assert engine.stats().kv_usage == 0.0


async def test_n_choices_take_n_sequences_and_prefill_once(start: Start) -> None:
    engine = await start(output_tokens=10)
    request = ask(n=3)
    async with aclosing(engine.generate(request)) as stream:
        await anext(stream)
        assert engine.stats().running == 3
    deltas = await run(engine, request)
    assert deltas[-1].usage is not None
    assert deltas[-1].usage.completion_tokens == 30
    assert engine.stats().prompt_tokens_total == 2 * deltas[-1].usage.prompt_tokens


async def test_more_choices_than_slots_run_in_turns(start: Start) -> None:
    engine = await start(**FREE, max_sequences=2)
    deltas = await run(engine, ask(n=5))
    assert sorted(delta.choice for delta in deltas if delta.finish_reason) == [0, 1, 2, 3, 4]


async def test_usage_is_what_a_ticket_was_sized_with(start: Start) -> None:
    engine = await start(**FREE)
    card = ModelCard(name="m", context_tokens=8192, tokenizer="scripted", template_overhead_tokens=4)
    request = GenerationRequest(
        request_id="sized",
        messages=(Message(role="system", content="Be nice."), Message(role="user", content="Hello there")),
        tools=(Tool(name="add", parameters={"type": "object"}),),
    )
    usage = (await run(engine, request))[-1].usage
    assert usage is not None
    assert usage.prompt_tokens == prompt_tokens(card, request)


async def test_a_fixed_service_time_is_the_same_for_every_request(start: Start) -> None:
    engine = await start(fixed_service_s=0.1, max_sequences=4)
    (delta,) = await run(engine, ask("A rather long text " * 20))
    assert len(delta.token_ids) > 50
    assert delta.finish_reason == "stop"
    assert delta.usage is not None
    took_s = await timed(asyncio.gather(*(run(engine, ask()) for _ in range(12))))
    assert 0.3 <= took_s <= 0.3 + SLACK_S


async def test_no_service_time_needs_no_timer_at_all(start: Start) -> None:
    engine = await start(fixed_service_s=0.0, max_sequences=2)
    loop = asyncio.get_running_loop()
    tasks = [asyncio.create_task(run(engine, ask())) for _ in range(20)]
    for _ in range(8):
        await asyncio.sleep(0)
        assert [timer for timer in loop._scheduled if not timer.cancelled()] == []
    assert all(task.done() for task in tasks)


async def test_an_aborted_place_is_refilled_in_fixed_time_too(start: Start) -> None:
    engine = await start(fixed_service_s=30.0, max_sequences=1)
    first, second = ask(), ask()
    tasks = [asyncio.create_task(run(engine, request)) for request in (first, second)]
    await until(lambda: engine.stats().running == 1)
    await engine.abort(first.request_id)
    assert await tasks[0] == []
    await until(lambda: engine.stats().running == 1)
    assert engine.stats().waiting == 0
    await engine.abort(second.request_id)
    assert await tasks[1] == []


async def test_aborting_a_waiting_request_leaves_the_running_one_alone(start: Start) -> None:
    engine = await start(max_sequences=1, output_tokens=50)
    first, second = ask(), ask()
    tasks = [asyncio.create_task(run(engine, request)) for request in (first, second)]
    await until(lambda: engine.stats().running == 1)
    await engine.abort(second.request_id)
    assert await tasks[1] == []
    assert len(await tasks[0]) == 50


async def test_start_up_takes_its_time(start: Start) -> None:
    assert await timed(start(start_up_s=0.1)) >= 0.1


async def test_without_max_tokens_the_text_ends_by_itself(start: Start) -> None:
    engine = await start(**FREE)
    deltas = await run(engine, ask("One two three"))
    assert "".join(delta.text for delta in deltas) == "One two three"
    assert deltas[-1].finish_reason == "stop"


async def test_without_max_tokens_the_context_ends_it(start: Start) -> None:
    engine = await start(**FREE, context_tokens=32, output_tokens=1000)
    deltas = await run(engine, ask("One"))
    usage = deltas[-1].usage
    assert deltas[-1].finish_reason == "length"
    assert usage is not None
    assert usage.total_tokens == 32


async def test_a_context_error_names_all_numbers_and_takes_nothing(start: Start) -> None:
    engine = await start(context_tokens=32)
    with pytest.raises(ContextLengthExceeded, match=r"32 tokens, but 105 .*\(5 in the prompt, 100 for"):
        await run(engine, ask("One", max_tokens=100))
    assert engine.stats().prompt_tokens_total == 0


async def test_token_ids_are_a_prompt_of_their_text(start: Start) -> None:
    engine = await start(**FREE)
    ids = tuple(tokenizer.encode("Once upon a time"))
    deltas = await run(engine, GenerationRequest(request_id="ids", prompt_token_ids=ids))
    assert "".join(delta.text for delta in deltas) == "Once upon a time"
    assert deltas[-1].usage is not None
    assert deltas[-1].usage.prompt_tokens == len(ids)


async def test_token_ids_of_another_model_are_refused(start: Start) -> None:
    engine = await start()
    with pytest.raises(InvalidRequest, match="token id 50256"):
        await run(engine, GenerationRequest(request_id="ids", prompt_token_ids=(50256,)))


@pytest.mark.parametrize("sampling", [{"n": 0}, {"max_tokens": 0}])
async def test_numbers_below_one_are_refused(start: Start, sampling: dict[str, int]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(sampling))):
        await run(await start(), ask(**sampling))


async def test_an_id_that_is_running_is_refused_and_free_afterwards(start: Start) -> None:
    engine = await start(output_tokens=5)
    request = ask()
    async with aclosing(engine.generate(request)) as stream:
        await anext(stream)
        with pytest.raises(Conflict):
            await run(engine, request)
    assert len(await run(engine, request)) == 5


async def test_an_engine_that_was_not_started_refuses_work() -> None:
    engine = ScriptedEngine("model")
    with pytest.raises(EngineFailed, match="not started"):
        await run(engine, ask())
    await engine.stop()


async def test_stopping_fails_what_runs(start: Start) -> None:
    engine = await start()
    task = asyncio.create_task(run(engine, ask("word " * 200)))
    await asyncio.sleep(0.02)
    await engine.stop()
    with pytest.raises(EngineFailed, match="stopped"):
        await task
    assert engine.stats().running == 0


async def test_a_stopped_engine_can_be_started_again(start: Start) -> None:
    engine = await start(**FREE)
    await engine.stop()
    await engine.start()
    assert await run(engine, ask())


def test_a_cache_too_small_for_one_context_is_refused() -> None:
    with pytest.raises(ValidationError, match="kv_tokens"):
        ScriptedConfig(context_tokens=4096, kv_tokens=1024)


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(ValidationError, match="itl"):
        ScriptedConfig.model_validate({"itl": 1})


def behind(request: GenerationRequest, deltas: list[TokenDelta]) -> GenerationRequest:
    """The request with these deltas of its only choice delivered."""
    begun = Progress(
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        text_chars=sum(len(delta.text) for delta in deltas),
    )
    return replace(request, progress=(begun,))


async def test_what_was_delivered_is_prefilled_with_the_prompt(start: Start) -> None:
    request = ask("word " * 100)
    deltas = await run(await start(**FREE), request)
    engine = await start(itl_base_s=0.0, itl_per_sequence_s=0.0, prefill_tokens_per_s=1000.0)
    took_s = await timed(run(engine, behind(request, deltas[:-1])))
    usage = deltas[-1].usage
    assert usage is not None
    assert engine.stats().prompt_tokens_total == usage.total_tokens - 1
    assert took_s >= (usage.total_tokens - 1) / 1000
    assert engine.stats().output_tokens_total == 1
    assert engine.stats().kv_usage == 0.0


async def test_an_end_that_is_all_that_is_left_needs_no_slot(start: Start) -> None:
    engine = await start(max_sequences=1, output_tokens=1000)
    request = ask(max_tokens=4)
    deltas = await run(engine, request)
    async with aclosing(engine.generate(ask())) as busy:
        await anext(busy)
        (last,) = await run(engine, behind(request, deltas))
    assert (last.text, last.token_ids, last.finish_reason) == ("", (), "length")
    assert last.usage == deltas[-1].usage


async def test_in_fixed_time_the_rest_comes_whole(start: Start) -> None:
    engine = await start(fixed_service_s=0.0)
    request = ask()
    (whole,) = await run(engine, request)
    begun = Progress(token_ids=whole.token_ids[:2], text_chars=3)
    (rest,) = await run(engine, replace(request, progress=(begun,)))
    assert rest.token_ids == whole.token_ids[2:]
    assert rest.text == whole.text[3:]
    assert rest.usage == whole.usage
    assert engine.stats().kv_usage == 0.0
