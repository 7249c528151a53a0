"""Rows 15, 16, 17, 20: clients that leave, read slowly, are too many or ask for too much."""

import asyncio
import json
from collections.abc import Mapping
from contextlib import AsyncExitStack

from tests.chaos.load import MODEL, OpenLoop, Reading, ask, body, words
from tests.chaos.outcomes import Call, Figure, Outcome, Result, p99
from tests.chaos.rows import Size, row
from tests.chaos.systems import REPLICAS, SLOTS, TOKENS_PER_S, Chaos, rate_rps
from tests.chaos.wire import CHAT, post
from tests.conftest import System

READERS, BYTES_PER_S = 50, 1024
_READ_EVERY_S = 0.25
_RECEIVE_BUFFER_BYTES = 4096  # the kernel shall not read for a slow reader


@row("15", "half of the clients leave mid-stream", "engine's running count back ≤ 1 s; nobody goes with them")
async def clients_leave(chaos: Chaos, size: Size, result: Result) -> None:
    del size
    loop = asyncio.get_running_loop()
    slots = REPLICAS * SLOTS
    calls = [Call(0, loop.time()) for _ in range(slots)]
    tasks = [
        asyncio.create_task(ask(chaos.system, 16 * TOKENS_PER_S, stream=True, call=call)) for call in calls
    ]
    while not all(call.tokens for call in calls):
        await asyncio.sleep(0.05)
    await _running_is(chaos.system, slots)
    leaving, staying = tasks[::2], tasks[1::2]
    for task in leaving:
        task.cancel()
    left_at = loop.time()
    # All slots were taken: who comes now waits for one that a leaver had, in the queue and in the engine.
    newcomers = asyncio.gather(*(ask(chaos.system, 5, stream=True) for _ in range(len(leaving) // 2)))
    back_s = await _running_is(chaos.system, len(staying) + 1, most=True) - left_at
    came = await newcomers
    result.calls = [*came, *await asyncio.gather(*staying)]
    served_s = max((call.first_at or loop.time()) for call in came) - left_at
    result.figures = [
        Figure(name="slots used again", value=served_s, most=1, ci_most=5),
        # Replicas report twice a second, and so does Ray's exporter, on a machine that has time for it. Those who
        # stay run on for longer than this.
        Figure(name="running metric back", value=back_s, most=2, ci_most=11),
    ]


async def _running_is(system: System, count: int, *, most: bool = False) -> float:
    """Until the engines say that they run so many (or, `most`, no more); the loop's time then."""
    async with asyncio.timeout(20):
        while True:
            running = await asyncio.to_thread(system.metric, "shoal_engine_running", model=MODEL)
            if running == count or (most and running < count):
                return asyncio.get_running_loop().time()
            await asyncio.sleep(0.1)


@row(
    "16",
    "50 readers at 1 KB/s",
    "the whole answer, or at the deadline an error event; others' p99 ≤ +10 %",
    allowed=(Outcome.CLEAN_ERROR,),
    mode="haproxy",  # Serve's own proxy reads for them, without a bound
)
async def slow_readers(chaos: Chaos, size: Size, result: Result) -> None:
    deadline_s = size.before_s + 6
    async with OpenLoop(chaos.system, rate_rps(25, 0.1), 25, stream=True) as alone:
        await asyncio.sleep(size.before_s + 3)
    readers = [
        asyncio.create_task(_slow(chaos.system, deadline_s, fat=number % 2 == 0)) for number in range(READERS)
    ]
    await asyncio.sleep(2)  # they all have begun
    async with OpenLoop(chaos.system, rate_rps(25, 0.1), 25, stream=True) as beside:
        await asyncio.sleep(size.before_s + 3)
    slow = [await reader for reader in readers]
    result.calls = [*alone.calls, *beside.calls, *slow]
    before, during = (p99([call.took_s for call in calls.calls]) for calls in (alone, beside))
    bad = [call for call in (*alone.calls, *beside.calls) if call.outcome is not Outcome.OK]
    result.figures = [
        Figure(name="others' p99 over before", value=during / before, unit="", most=1.1, ci_most=2.5),
        Figure(name="others not ok", value=len(bad), unit="", most=0),
        Figure(name="error events", value=sum(call.outcome is Outcome.CLEAN_ERROR for call in slow), unit=""),
    ]


async def _slow(system: System, deadline_s: float, *, fat: bool) -> Call:
    """One who reads slowly until the stream's deadline, then fast, to see how it ended.

    `fat`: each token comes with so many alternatives that no buffer on the way holds the answer.
    """
    loop = asyncio.get_running_loop()
    call = Call(0, loop.time(), label="slow, fat" if fat else "slow")
    count = 150
    text = words(1_000_000, count)
    asked = body(text, stream=True, **({"logprobs": True, "top_logprobs": 20} if fat else {}))
    headers = {"x-request-timeout-ms": str(int(deadline_s * 1000))}
    reading = Reading(call, text)
    try:
        async with (
            asyncio.timeout(deadline_s + 60),
            post(
                system.http + CHAT, asked, headers=headers, receive_buffer=_RECEIVE_BUFFER_BYTES
            ) as response,
        ):
            call.status = response.status
            pieces = response.pieces()
            read = 0
            async for piece in pieces:
                reading.feed(piece)
                read += len(piece)
                slow_until = min(call.started_at + read / BYTES_PER_S, call.started_at + deadline_s + 2)
                await asyncio.sleep(max(slow_until - loop.time(), 0))
            reading.finish()
    except (OSError, ValueError) as error:
        call.outcome, call.detail = Outcome.CONN_ERROR, f"{error!r} after {call.tokens} of {count} tokens"
    call.ended_at = loop.time()
    return call


@row(
    "17",
    "2x, 3x, 5x overload",
    "goodput ≥ 95 % of capacity; top class ≥ 99 % in SLO; refusals p99 ≤ 100 ms; normal ≤ 10 s after",
    allowed=(Outcome.SHED, Outcome.CLEAN_ERROR),
)
async def overload(chaos: Chaos, size: Size, result: Result) -> None:
    for factor in size.overload:
        await _overload(chaos, factor, size.overload_s, result)


async def _overload(chaos: Chaos, factor: float, seconds: float, result: Result) -> None:
    """A fifth of capacity in the upper class, all the rest in the lower; a deadline is everybody's SLO."""
    loop, count, slo_s = asyncio.get_running_loop(), 80, 10
    service_s = count / TOKENS_PER_S
    capacity_rps = rate_rps(count, 1)
    headers = {"x-request-timeout-ms": str(slo_s * 1000)}
    async with AsyncExitStack() as stack:
        upper, lower = [
            await stack.enter_async_context(
                OpenLoop(
                    chaos.system,
                    capacity_rps * share,
                    count,
                    stream=False,
                    headers=headers,
                    label=tier,
                    service_tier=tier,
                )
            )
            for share, tier in ((0.2, "default"), (factor - 0.2, "flex"))
        ]
        began = loop.time()
        await asyncio.sleep(seconds + 2 * service_s)
        ended = loop.time()
        upper.stop()
        lower.stop()
        normal_s = await _normal_after(chaos, count=10, ended=ended)
    calls = [*upper.calls, *lower.calls]
    good = [c for c in calls if c.outcome is Outcome.OK and began + 2 * service_s < c.ended_at <= ended]
    in_slo = [c for c in upper.calls if c.outcome is Outcome.OK and c.took_s <= slo_s]
    refused = [c.took_s for c in calls if c.outcome is Outcome.SHED]
    result.calls += calls
    result.figures += [
        Figure(
            name=f"goodput at {factor:g}x", unit="of capacity", least=0.95, ci_least=0.5,
            value=len(good) / (ended - began - 2 * service_s) / capacity_rps,
        ),
        Figure(
            name=f"upper class in SLO at {factor:g}x", unit="", least=0.99, ci_least=0.8,
            value=len(in_slo) / len(upper.calls),
        ),
        Figure(name=f"refusals' p99 at {factor:g}x", value=p99(refused), most=0.1, ci_most=3),
        Figure(name=f"refused at {factor:g}x", value=len(refused), unit="", least=1),
        Figure(name=f"normal after {factor:g}x", value=normal_s, most=10, ci_most=30),
    ]  # fmt: skip


async def _normal_after(chaos: Chaos, *, count: int, ended: float) -> float:
    """Seconds from the end of the overload until a call takes at most twice its service time."""
    async with asyncio.timeout(60):
        while True:
            call = await ask(chaos.system, count, stream=False)
            if call.outcome is Outcome.OK and call.took_s < 2 * count / TOKENS_PER_S + 0.5:
                return call.ended_at - ended
            await asyncio.sleep(0.2)


@row("20", "prompt over context; 14 MB body", "400 / 413 in ≤ 200 ms, before the queue")
async def bad_sizes(chaos: Chaos, size: Size, result: Result) -> None:
    del size
    before = await asyncio.to_thread(chaos.books.read)
    long = body(words(0, 9000), stream=True)
    huge = body("x" * 14_000_000, stream=True)
    for name, asked, status, code in (
        ("prompt over context", long, 400, "context_length_exceeded"),
        ("14 MB body", huge, 413, "payload_too_large"),
    ):
        payload = json.dumps(asked).encode()
        answers = [await _refused(chaos.system, payload) for _ in range(5)]
        took_s = [answer[0] for answer in answers]
        for _, got, error in answers:
            if (got, error.get("code")) != (status, code):
                result.problems.append(f"{name}: {got} {error}, not {status} {code}")
        result.figures.append(Figure(name=name, value=sorted(took_s)[2], most=0.2, ci_most=3))
    after = await asyncio.to_thread(chaos.books.read)
    result.figures.append(
        Figure(name="tickets", value=after["accepted"] - before["accepted"], unit="", most=0)
    )


async def _refused(system: System, payload: bytes) -> tuple[float, int, Mapping[str, str]]:
    loop = asyncio.get_running_loop()
    started = loop.time()
    async with post(system.http + CHAT, payload) as response:
        error = (await response.json()).get("error", {})
        return loop.time() - started, response.status, error
