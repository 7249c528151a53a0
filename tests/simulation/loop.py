"""An event loop in virtual time that knows whose code it runs, so that a process can die between any two steps.

Time stands still while anything is ready and then jumps to the next timer. Every callback belongs to the process
whose context it carries: those of a killed process are never run again (no `finally` either: that is what kill -9
does), those of a stopped one wait until it goes on. One callback is one step; a step is what runs between two
awaits.
"""

from __future__ import annotations

import asyncio
import contextvars
import enum
import heapq
from collections.abc import Callable
from typing import Any

_MOST_STEPS_AT_ONE_TIME = 100_000
_RESOLUTION_S = 1e-9


class State(enum.Enum):
    RUNNING = enum.auto()
    STOPPED = enum.auto()  # SIGSTOP
    DEAD = enum.auto()


class Process:
    """What dies together. `context` makes a callback its own."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.state = State.RUNNING
        self.context = contextvars.Context()
        self.context.run(_PROCESS.set, self)
        self.held: list[asyncio.Handle] = []  # what became ready since it was stopped or killed
        self.after_step: Callable[[], None] | None = None

    def __repr__(self) -> str:
        return self.name

    def fresh_context(self) -> contextvars.Context:
        """A context without anything but the process, as `contextvars.Context()` is in a real one."""
        context = contextvars.Context()
        context.run(_PROCESS.set, self)
        return context


_PROCESS: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)
NOBODY = contextvars.Context()  # of what goes on whoever dies


def running_process() -> Process | None:
    """Whose code runs; None: the simulation's own."""
    return _PROCESS.get()


def current_process() -> Process:
    """Whose code runs, where it must be somebody's."""
    process = _PROCESS.get()
    assert process is not None, "this is called from a process"
    return process


def fresh_context() -> contextvars.Context:
    """In the place of `contextvars.Context`: the code under test makes contexts that must not lose the process."""
    return current_process().fresh_context()


class Stalled(AssertionError):
    """The simulation cannot go on: nothing is ready and no timer runs, or time stands still for ever."""


class VirtualLoop(asyncio.BaseEventLoop):
    """See the module's docstring.

    Attributes:
        steps: callbacks run so far.
        interrupts: called before the step of that number.
        problems: what reached the loop's exception handler.
    """

    def __init__(self) -> None:
        super().__init__()
        self._now = 1000.0
        self._clock_resolution = _RESOLUTION_S
        self._time_began_at_step = 0
        self.steps = 0
        self.interrupts: dict[int, Callable[[], None]] = {}
        self.problems: list[str] = []
        # By task, and strong: what a dead process awaited must not be collected.
        self.tasks: dict[asyncio.Task[Any], Process | None] = {}
        self.set_exception_handler(self._note)
        self.set_task_factory(_keeping)

    def time(self) -> float:
        return self._now

    def interrupt_in(self, steps: int, action: Callable[[], None]) -> None:
        """Call `action` between two steps, `steps` from now."""
        at = self.steps + max(steps, 1)
        while at in self.interrupts:
            at += 1
        self.interrupts[at] = action

    def timers_of(self, process: Process) -> list[asyncio.TimerHandle]:
        """Timers that run in a process."""
        return [t for t in self._scheduled if not t._cancelled and t._context.get(_PROCESS) is process]

    def tasks_of(self, process: Process) -> list[asyncio.Task[Any]]:
        """Tasks of a process that have not ended."""
        return [task for task, owner in self.tasks.items() if owner is process and not task.done()]

    def resume(self, process: Process) -> None:
        """SIGCONT."""
        if process.state is State.STOPPED:
            process.state = State.RUNNING
            self._ready.extend(process.held)
            process.held = []

    def _run_once(self) -> None:
        self._collect_due()
        ready = self._ready
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle._cancelled:
                continue
            self.steps += 1
            if self.interrupts and (action := self.interrupts.pop(self.steps, None)) is not None:
                action()
            owner = handle._context.get(_PROCESS)
            if owner is None:
                handle._run()
            elif owner.state is not State.RUNNING:
                owner.held.append(handle)
            else:
                handle._run()
                if owner.after_step is not None:
                    owner.after_step()

    def _collect_due(self) -> None:
        ready, scheduled = self._ready, self._scheduled
        while scheduled and scheduled[0]._cancelled:
            heapq.heappop(scheduled)._scheduled = False
        if not ready and not self._stopping:
            if not scheduled:
                raise Stalled("nothing is ready and no timer runs: somebody waits for ever")
            self._now = max(self._now, scheduled[0]._when)
            self._time_began_at_step = self.steps
        elif self.steps - self._time_began_at_step > _MOST_STEPS_AT_ONE_TIME:
            raise Stalled("time stands still: something turns without a pause")
        while scheduled and scheduled[0]._when <= self._now:
            timer = heapq.heappop(scheduled)
            timer._scheduled = False
            if not timer._cancelled:
                ready.append(timer)

    def _write_to_self(self) -> None:
        """No selector has to wake up: there is one thread."""

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """The heap drops it when it comes to the top."""

    def _note(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.problems.append(f"{context.get('message')}: {context.get('exception')!r}")


def _keeping(
    loop: asyncio.AbstractEventLoop, coro: Any, context: contextvars.Context | None = None
) -> asyncio.Task[Any]:
    assert isinstance(loop, VirtualLoop)
    task = asyncio.Task(coro, loop=loop, context=context)
    loop.tasks[task] = _PROCESS.get() if context is None else context.get(_PROCESS)
    return task
