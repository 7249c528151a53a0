"""Rows 3, 4, 5, 6, 23: gateways, proxies, the queue and Serve's controller die, and everything is updated."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from tests.chaos import faults
from tests.chaos.documents import Uploads
from tests.chaos.load import MODEL, OpenLoop, ask
from tests.chaos.outcomes import Call, Figure, Outcome, Result
from tests.chaos.rows import Size, failure_window, longest_gap, row
from tests.chaos.systems import REPLICAS, SLOTS, Chaos, rate_rps, victim
from tests.conftest import app_of, until

WHOLE, STREAM = 50, 100  # tokens: two and four seconds
_updates = itertools.count(1)


@asynccontextmanager
async def mixed(chaos: Chaos) -> AsyncIterator[list[Call]]:
    """Streams and whole answers, half of the load each; yields a list that holds all calls afterwards."""
    async with AsyncExitStack() as both:
        streams = await both.enter_async_context(
            OpenLoop(chaos.system, rate_rps(STREAM) / 2, STREAM, stream=True)
        )
        wholes = await both.enter_async_context(
            OpenLoop(chaos.system, rate_rps(WHOLE) / 2, WHOLE, stream=False)
        )
        calls: list[Call] = []
        yield calls
        streams.stop()
        wholes.stop()
    calls += streams.calls + wholes.calls


@row(
    "3",
    "kill -9 one of 2 gateways",
    "failures only among its own in-flight; window ≤ 2 s; jobs 0 lost",
    allowed=(Outcome.CONN_ERROR, Outcome.CLEAN_ERROR),
)
async def gateway_killed(chaos: Chaos, size: Size, result: Result) -> None:
    before = faults.gateways(chaos.system)
    async with mixed(chaos) as calls, Uploads(chaos.system) as uploads:
        await asyncio.sleep(size.before_s)
        killed_at = faults.kill(victim(before))
        await asyncio.sleep(size.after_s)
    in_flight = [call for call in calls if call.started_at <= killed_at <= call.ended_at]
    failed = [call for call in calls if call.outcome is not Outcome.OK]
    late = [call for call in failed if call not in in_flight]
    result.calls = calls
    result.figures = [
        failure_window(calls, killed_at, most=2, ci_most=10),
        Figure(name="failed of those in flight", value=len(failed) - len(late), unit="", most=len(in_flight)),
        Figure(name="failed though begun later", value=len(late), unit="", most=0, ci_most=10),
        Figure(name="jobs acknowledged", value=len(uploads.acknowledged), unit="", least=1),
        Figure(name="jobs lost", value=len(await uploads.lost()), unit="", most=0),
    ]


async def _proxy_killed(chaos: Chaos, size: Size, result: Result, title: str) -> None:
    async with mixed(chaos) as calls:
        await asyncio.sleep(size.before_s)
        victims = faults.processes(chaos.system, title)
        assert victims, f"no process {title}"
        for pid in victims:
            killed_at = faults.kill(pid)
        # Where no proxy listens a call fails in no time: go on until it is back.
        await until_served(chaos, timeout_s=60)
        await asyncio.sleep(size.after_s)
    result.calls = calls
    result.figures = [failure_window(calls, killed_at, most=10, ci_most=40)]


async def until_served(chaos: Chaos, timeout_s: float) -> None:
    """Until a call is answered."""
    async with asyncio.timeout(timeout_s):
        while (await ask(chaos.system, 5, stream=False)).outcome is not Outcome.OK:
            await asyncio.sleep(0.2)


@row("4", "kill -9 Serve's proxy", "window ≤ 10 s", allowed=(Outcome.CONN_ERROR, Outcome.CLEAN_ERROR))
async def proxy_killed(chaos: Chaos, size: Size, result: Result) -> None:
    await _proxy_killed(chaos, size, result, faults.PROXY)


@row(
    "4 haproxy",
    "kill -9 HAProxy",
    "window ≤ 10 s",
    allowed=(Outcome.CONN_ERROR, Outcome.CLEAN_ERROR),
    mode="haproxy",
)
async def haproxy_killed(chaos: Chaos, size: Size, result: Result) -> None:
    await _proxy_killed(chaos, size, result, faults.HAPROXY)


@row("5", "kill -9 BatchingQueue", "0 lost; dispatch resumes ≤ 5 s")
async def queue_killed(chaos: Chaos, size: Size, result: Result) -> None:
    async with mixed(chaos) as calls:
        await asyncio.sleep(size.before_s)
        # More than there are slots for: the line is long when its queue dies.
        burst = [asyncio.create_task(ask(chaos.system, WHOLE, stream=False)) for _ in range(REPLICAS * SLOTS)]
        await asyncio.sleep(1)
        killed_at = faults.kill(faults.queue(chaos.system))
        await asyncio.sleep(max(size.after_s, 8))
    calls += [await task for task in burst]
    # Tokens of what was granted before the death come at once; the next first token is of the next queue.
    began = [call.first_at - killed_at for call in calls if call.first_at and call.first_at > killed_at + 0.3]
    result.calls = calls
    result.figures = [
        Figure(name="dispatch resumes", value=min(began, default=99), most=5, ci_most=20),
        longest_gap(calls, most=1, ci_most=10),
    ]


@row("6", "kill -9 Serve's controller", "0 failures")
async def controller_killed(chaos: Chaos, size: Size, result: Result) -> None:
    async with mixed(chaos) as calls:
        await asyncio.sleep(size.before_s)
        [pid] = faults.processes(chaos.system, faults.CONTROLLER)
        killed_at = faults.kill(pid)
        await until(
            lambda: faults.processes(chaos.system, faults.CONTROLLER) not in ([], [pid]), timeout_s=60
        )
        back_s = asyncio.get_running_loop().time() - killed_at
        await asyncio.sleep(size.after_s)
    result.calls = calls
    result.figures = [
        longest_gap(calls, most=1, ci_most=10),
        Figure(name="controller back", value=back_s),
    ]


@row("23", "rolling update of model and gateways under load", "0 failed, 0 truncated")
async def rolling_update(chaos: Chaos, size: Size, result: Result) -> None:
    system, number = chaos.system, next(_updates)
    loop = asyncio.get_running_loop()
    took_s = {}
    async with mixed(chaos) as calls:
        await asyncio.sleep(size.before_s)
        for builder, app, deployment in (
            ("build_model", MODEL, "LLMReplica"),
            ("build_gateway", "gateway", "Gateway"),
        ):
            before, started = faults.pids(system, app, deployment), loop.time()
            changed = app_of(system.config, builder)["args"]  # the new config stays
            if builder == "build_model":
                changed["engine"]["scripted"]["hang_bound_s"] = 5 + number / 1000
            else:
                changed["max_upload_bytes"] = 512_000_000 + number
            system.put(system.config)
            await until(lambda: _replaced(chaos, app, deployment, before), timeout_s=180)  # noqa: B023  awaited here
            took_s[deployment] = loop.time() - started
        await asyncio.sleep(1)
    result.calls = calls
    result.figures = [
        longest_gap(calls, most=1, ci_most=10),
        *(Figure(name=f"{name} updated", value=value) for name, value in took_s.items()),
    ]


def _replaced(chaos: Chaos, app: str, deployment: str, before: set[int]) -> bool:
    """None of the old replicas runs, and as many new ones do."""
    status = chaos.system.status()[app]
    now = faults.pids(chaos.system, app, deployment)
    return status["status"] == "RUNNING" and len(now) == len(before) and not now & before
