"""One run: a scenario played to its end, and what was wrong in it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import structlog

from actors import llm_replica, telemetry
from actors.handles import call, llm, outbox, queue
from tests.simulation.checks import left_behind
from tests.simulation.faults import Faults
from tests.simulation.loop import Stalled, State, VirtualLoop, fresh_context
from tests.simulation.plan import Fault, Scenario
from tests.simulation.trace import Trace
from tests.simulation.world import World, replica_context

_SETTLE_S = 60.0  # after the last outcome: what a fault left in the books is found by then
_TICK_S = 0.25
_MOST_S = 400.0


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of one run."""

    seed: int
    wrongs: list[str]
    trace: list[str]
    steps: int
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)  # of the counters of the code under test
    pairs: int = 0  # of tenants that waited together while nothing had broken
    closest: float = 0.0  # share of the fairness bound that was used
    slowest_s: float = 0.0  # answer of a patient caller, beyond the work that all brought
    first_step: int = 0  # of the loop when the first request came
    last_step: int = 0  # and when the last one had its outcome


def play(plan: Scenario, *, verbose: bool = False) -> Result:
    """Run a scenario in virtual time.

    Args:
        plan: what happens.
        verbose: keep a trace of every message, fault and log line.
    """
    loop = VirtualLoop()
    trace = Trace(loop, verbose=verbose)
    world = World(loop, plan, trace)
    collecting = gc.isenabled()
    gc.disable()  # what a dead process awaited may be collected after the run only
    try:
        with _simulated(loop, world, trace):
            steps = _Steps()
            try:
                loop.run_until_complete(_drive(world, steps))
            except Stalled as error:
                world.wrongs.append(str(error))
            finally:
                wrongs = world.wrongs + trace.errors + loop.problems
                for caller in world.callers:
                    wrongs += caller.wrongs(world.deaths())
                wrongs += left_behind(world)
                counted = loop.steps
                _tidy(loop, world)
    finally:
        if collecting:
            gc.enable()
    return Result(
        seed=plan.seed,
        wrongs=wrongs,
        trace=trace.lines,
        steps=counted,
        outcomes=Counter(caller.outcome or "silence" for caller in world.callers),
        faults=[kind.value for kind in world.faults],
        counts=world.counts,
        pairs=sum(queue.watch.pairs for queue in world.queues if queue.watch is not None),
        closest=max((queue.watch.closest for queue in world.queues if queue.watch is not None), default=0.0),
        slowest_s=max(
            (c.ended_at - c.began_at for c in world.callers if c.outcome == "complete"), default=0.0
        )
        - sum(len(c.token_ids[0]) + c.ask.words * c.ask.read_pause_s for c in world.callers) * plan.itl_s,
        first_step=steps.first,
        last_step=steps.last,
    )


@dataclass
class _Steps:
    first: int = 0
    last: int = 0


async def _drive(world: World, steps: _Steps) -> None:
    loop, plan = world.loop, world.plan
    began_at = loop.time()
    faults = Faults(world)
    world.start()
    for fault in plan.faults:
        loop.call_at(began_at + fault.at_s, _arm, loop, faults, fault)
    if plan.fault_at_step is not None:
        at_step, kind = plan.fault_at_step
        fault = Fault(kind=kind, at_s=0.0, steps=0, pick=0.0, lasts_s=4.0, back_after_s=0.5)
        loop.interrupts[at_step] = lambda: faults.strike(fault)
    for ask in plan.asks:
        loop.call_at(began_at + ask.at_s, world.arrive, ask)
    steps.first = loop.steps
    first_at = began_at + min(ask.at_s for ask in plan.asks)
    await asyncio.sleep(first_at - loop.time())
    steps.first = loop.steps
    until = began_at + _MOST_S
    while len(world.callers) < len(plan.asks) or any(c.outcome is None for c in world.callers):
        if loop.time() > until:
            break
        await asyncio.sleep(_TICK_S)
    steps.last = loop.steps
    last_fault_at = began_at + max((f.at_s + f.lasts_s for f in plan.faults), default=0.0)
    until = max(loop.time(), last_fault_at) + _SETTLE_S
    await asyncio.sleep(max(last_fault_at - loop.time(), 1.0))
    while left_behind(world) and loop.time() < until:
        await asyncio.sleep(_TICK_S)


def _arm(loop: VirtualLoop, faults: Faults, fault: Fault) -> None:
    loop.interrupt_in(fault.steps, lambda: faults.strike(fault))


@contextlib.contextmanager
def _simulated(loop: VirtualLoop, world: World, trace: Trace) -> Iterator[None]:
    """Put the loop's time, the fake Serve and the trace in the place of the real ones."""
    contexts = SimpleNamespace(Context=fresh_context)
    nothing: Any = lambda *_args, **_labels: None  # noqa: E731  the metrics
    with contextlib.ExitStack() as stack:
        for target, name, value in [
            (time, "monotonic", loop.time),
            (time, "perf_counter", loop.time),
            (call, "contextvars", contexts),
            (outbox, "contextvars", contexts),
            (queue, "deployment_handle", world.network.handle),
            (llm, "deployment_handle", world.network.handle),
            (llm, "DIRECTORY", world.directories),
            (llm_replica, "serve", SimpleNamespace(get_replica_context=replica_context)),
            (llm_replica, "_BOOT_S", 0.0),
            (telemetry, "configure_logging", nothing),
            (telemetry, "count", world.count),
            (telemetry, "gauge", nothing),
            (telemetry, "observe", nothing),
        ]:
            stack.enter_context(patch.object(target, name, value))
        before = structlog.get_config()
        structlog.configure(
            processors=[trace.log], wrapper_class=trace.wrapper, cache_logger_on_first_use=False
        )
        try:
            yield
        finally:
            structlog.configure(**before)


def _tidy(loop: VirtualLoop, world: World) -> None:
    """End every task, those of dead processes too, with all ways out cut."""
    world.network.closed = True
    world.network.open.clear()
    loop.interrupts.clear()
    for server in [*world.gateways, *world.queues, *world.replicas]:
        server.process.after_step = None
        if server.process.state is not State.RUNNING:
            server.process.state = State.RUNNING
            loop._ready.extend(server.process.held)
            server.process.held = []
    for _ in range(3):  # one that is cancelled may have others to end
        open_ = [task for task in loop.tasks if not task.done()]
        if not open_:
            break
        for task in open_:
            task.cancel()
        loop.run_until_complete(asyncio.wait(open_, timeout=1.0))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()
