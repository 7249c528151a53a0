"""The scripted engine breaks as it is told to."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from actors.engines.scripted import ScriptedConfig, ScriptedEngine
from actors.engines.scripted_faults import FaultKind, ScriptedFault, directive
from actors.engines.scripted_loop import EXIT_STATUS
from actors.errors import EngineFailed, InvalidRequest
from actors.types import GenerationRequest, Message, Progress, TokenDelta

BOUND_S = 0.15
Start = Callable[..., Awaitable[ScriptedEngine]]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    engines: list[ScriptedEngine] = []

    async def build(**config: Any) -> ScriptedEngine:
        settings = {"itl_base_s": 0.002, "output_tokens": 20, "hang_bound_s": BOUND_S, **config}
        engine = ScriptedEngine("model", ScriptedConfig(**settings))
        engines.append(engine)
        await engine.start()
        return engine

    yield build
    for engine in engines:
        await engine.stop()


def ask(text: str = "Hello", request_id: str = "r") -> GenerationRequest:
    return GenerationRequest(request_id=request_id, messages=(Message(role="user", content=text),))


async def read(engine: ScriptedEngine, request: GenerationRequest, into: list[TokenDelta]) -> None:
    async for delta in engine.generate(request):
        into.append(delta)  # noqa: PERF401  what came before a failure counts


async def test_a_crash_fails_every_stream_and_the_engine_for_good(start: Start) -> None:
    engine = await start(output_tokens=2000)
    tasks = [asyncio.create_task(read(engine, ask(request_id=str(n)), [])) for n in range(3)]
    await asyncio.sleep(0.01)
    engine.inject(ScriptedFault(kind=FaultKind.CRASH))
    for task in tasks:
        with pytest.raises(EngineFailed, match="crashed"):
            await task
    with pytest.raises(EngineFailed, match="crashed"):
        await engine.check_health()
    with pytest.raises(EngineFailed, match="crashed"):
        await read(engine, ask(), [])
    assert (engine.stats().running, engine.stats().waiting, engine.stats().kv_usage) == (0, 0, 0.0)


async def test_a_crashed_engine_works_after_a_new_start(start: Start) -> None:
    engine = await start()
    engine.inject(ScriptedFault(kind=FaultKind.CRASH))
    await asyncio.sleep(0.01)
    await engine.start()
    got: list[TokenDelta] = []
    await read(engine, ask(), got)
    assert len(got) == 20
    await engine.check_health()


async def test_a_crash_can_wait_for_tokens(start: Start) -> None:
    engine = await start()
    got: list[TokenDelta] = []
    engine.inject(ScriptedFault(kind=FaultKind.CRASH, after_tokens=5))
    with pytest.raises(EngineFailed):
        await read(engine, ask(), got)
    assert len(got) == 5


async def test_running_out_of_memory_says_so(start: Start) -> None:
    engine = await start()
    engine.inject(ScriptedFault(kind=FaultKind.OUT_OF_MEMORY, after_tokens=3))
    with pytest.raises(EngineFailed, match="out of memory"):
        await read(engine, ask(), [])


async def test_a_hang_at_work_is_noticed_within_the_bound(start: Start) -> None:
    engine = await start()
    got: list[TokenDelta] = []
    task = asyncio.create_task(read(engine, ask(), got))
    engine.inject(ScriptedFault(kind=FaultKind.HANG, after_tokens=5))
    async with asyncio.timeout(5):
        while len(got) < 5:
            await asyncio.sleep(0.001)
    await asyncio.sleep(0.03)
    assert (len(got), task.done()) == (5, False)
    started = time.monotonic()
    with pytest.raises(EngineFailed, match="hangs"):
        await engine.check_health()
    assert time.monotonic() - started < BOUND_S + 0.3
    engine.clear_faults()
    await task
    assert len(got) == 20
    await engine.check_health()


async def test_a_hang_of_an_idle_engine_is_noticed_too(start: Start) -> None:
    engine = await start()
    engine.inject(ScriptedFault(kind=FaultKind.HANG))
    with pytest.raises(EngineFailed, match="hangs"):
        await engine.check_health()


async def test_a_request_of_a_hanging_engine_can_be_aborted(start: Start) -> None:
    engine = await start()
    engine.inject(ScriptedFault(kind=FaultKind.HANG))
    task = asyncio.create_task(read(engine, ask(), []))
    await asyncio.sleep(0.02)
    await engine.abort("r")
    await asyncio.wait_for(task, 1)
    assert engine.stats().waiting == 0


async def test_a_long_step_is_no_hang(start: Start) -> None:
    engine = await start(itl_base_s=3 * BOUND_S, output_tokens=1)
    task = asyncio.create_task(read(engine, ask(), []))
    await asyncio.sleep(0.01)
    await engine.check_health()
    await task


async def test_slow_means_so_many_times_slower_until_it_is_cleared(start: Start) -> None:
    engine = await start(itl_base_s=0.001, itl_per_sequence_s=0.0, prefill_tokens_per_s=None)
    engine.inject(ScriptedFault(kind=FaultKind.SLOW, factor=30))
    started = time.monotonic()
    await read(engine, ask(), [])
    assert time.monotonic() - started >= 20 * 0.03
    engine.clear_faults()
    started = time.monotonic()
    await read(engine, ask(), [])
    assert time.monotonic() - started < 20 * 0.03


async def test_slow_holds_for_a_fixed_service_time(start: Start) -> None:
    engine = await start(fixed_service_s=0.02)
    engine.inject(ScriptedFault(kind=FaultKind.SLOW, factor=5))
    started = time.monotonic()
    await read(engine, ask(), [])
    assert time.monotonic() - started >= 0.1


async def test_faults_of_the_config_are_armed_at_the_start(start: Start) -> None:
    engine = await start(faults=[{"kind": "crash", "after_tokens": 2}])
    got: list[TokenDelta] = []
    with pytest.raises(EngineFailed):
        await read(engine, ask(), got)
    assert len(got) == 2


async def test_a_directive_strikes_only_where_the_config_allows_it(start: Start) -> None:
    text = "[[shoal:crash after=4]] please"
    got: list[TokenDelta] = []
    await read(await start(), ask(text), got)
    assert len(got) == 20
    got.clear()
    with pytest.raises(EngineFailed, match="crashed"):
        await read(await start(allow_directives=True), ask(text), got)
    assert len(got) == 4


def test_exit_ends_the_process() -> None:
    program = (
        "import asyncio\n"
        "from actors.engines.scripted import ScriptedConfig, ScriptedEngine\n"
        "from actors.engines.scripted_faults import ScriptedFault\n"
        "async def main():\n"
        "    engine = ScriptedEngine('m', ScriptedConfig(faults=(ScriptedFault(kind='exit'),)))\n"
        "    await engine.start()\n"
        "    await asyncio.sleep(10)\n"
        "asyncio.run(main())\n"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=50, check=False).returncode == EXIT_STATUS


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("nothing here", None),
        ("[[shoal:crash after=5]]", ScriptedFault(kind=FaultKind.CRASH, after_tokens=5)),
        ("first [[shoal:hang]] then", ScriptedFault(kind=FaultKind.HANG)),
        ("[[shoal:slow factor=2.5]]", ScriptedFault(kind=FaultKind.SLOW, factor=2.5)),
        ("[[shoal:oom]]", ScriptedFault(kind=FaultKind.OUT_OF_MEMORY)),
        ("[[shoal:exit after=1]]", ScriptedFault(kind=FaultKind.EXIT, after_tokens=1)),
    ],
)
def test_directives_are_read_from_the_text(text: str, fault: ScriptedFault | None) -> None:
    assert directive(text) == fault


@pytest.mark.parametrize(
    "text", ["[[shoal:]]", "[[shoal:burn]]", "[[shoal:crash after=x]]", "[[shoal:crash at=5]]"]
)
def test_a_directive_that_is_none_is_refused_with_what_there_is(text: str) -> None:
    with pytest.raises(InvalidRequest, match="crash, exit, oom, hang, slow"):
        directive(text)


async def test_a_hang_that_is_known_fails_every_further_check_at_once(start: Start) -> None:
    engine = await start()
    engine.inject(ScriptedFault(kind=FaultKind.HANG))
    started = time.monotonic()
    for _ in range(3):
        with pytest.raises(EngineFailed, match="hangs"):
            await engine.check_health()
    assert BOUND_S <= time.monotonic() - started <= 2 * BOUND_S
    engine.clear_faults()
    await engine.check_health()


async def test_a_continued_request_does_not_break_the_next_engine_too(start: Start) -> None:
    request = ask("[[shoal:crash after=5]] One two three four five six seven")
    got: list[TokenDelta] = []
    with pytest.raises(EngineFailed):
        await read(await start(allow_directives=True), request, got)
    begun = Progress(
        token_ids=tuple(token for delta in got for token in delta.token_ids),
        text_chars=sum(len(delta.text) for delta in got),
    )
    await read(await start(allow_directives=True), replace(request, progress=(begun,)), got)
    assert got[-1].usage is not None
    with pytest.raises(EngineFailed):  # nothing was delivered: the request breaks whoever takes it
        await read(await start(allow_directives=True), replace(request, progress=(Progress(),)), [])
