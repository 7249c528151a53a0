"""The scripted engine's clock: one asyncio task that paces its batch by the service curve.

Owned by `ScriptedEngine`. Steps follow an absolute schedule, so late timers do not add up; all deltas of a step
are delivered in the same tick of the event loop. With nothing to do the task is parked: no polling. Faults strike
between two steps.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable

from actors.engines.scripted_batch import Batch, Sequence, Stream
from actors.engines.scripted_faults import FaultKind, ScriptedFault
from actors.engines.service_curve import ServiceCurve
from actors.errors import EngineFailed
from actors.telemetry import logger

EXIT_STATUS = 70  # of the process after an `exit` fault
MAX_LAG_S = 1.0  # how far behind its schedule the loop may catch up by steps without a pause


class StepLoop:
    """Runs a batch until it is stopped or a fault ends it.

    Args:
        batch: what is run.
        curve: how long it takes.
        hang_bound_s: a step that is so late counts as hanging.
    """

    def __init__(self, batch: Batch, curve: ServiceCurve, hang_bound_s: float) -> None:
        self._batch = batch
        self._curve = curve
        self._hang_bound_s = hang_bound_s
        self._streams: dict[str, Stream] = {}
        self._armed: list[tuple[ScriptedFault, int]] = []  # with the output_tokens_total at which it strikes
        self._slow = 1.0
        self._due = 0.0  # when the current step ends; health allows for it
        self._wake = asyncio.Event()
        self._healed = asyncio.Event()
        self._progress: list[asyncio.Future[None]] = []
        self._asked_at: float | None = None  # since when a health check waits for an answer
        self._clock = asyncio.get_running_loop().time
        self.failure: str | None = None
        self._task = asyncio.create_task(self._run())

    def submit(self, stream: Stream, sequences: Iterable[Sequence]) -> None:
        """Take a request in."""
        self._streams[stream.request_id] = stream
        self._batch.add(sequences)
        self._wake.set()

    def stream(self, request_id: str) -> Stream | None:
        """The request of that id, until its consumer has left."""
        return self._streams.get(request_id)

    def drop(self, stream: Stream) -> None:
        """Forget a request: its slot is free at once and its stream ends."""
        if self._streams.get(stream.request_id) is not stream:
            return
        del self._streams[stream.request_id]
        if not stream.ended:
            self._batch.drop(stream)
            stream.end()
            self._wake.set()

    def inject(self, fault: ScriptedFault) -> None:
        """Let a fault strike once the engine has produced `after_tokens` more."""
        self._armed.append((fault, self._batch.output_tokens_total + fault.after_tokens))
        self._wake.set()

    def clear_faults(self) -> None:
        """End a hang or a slowness and disarm what has not struck yet."""
        self._armed.clear()
        self._slow = 1.0
        self._healed.set()

    async def check_health(self) -> None:
        """Wait for the next sign of progress.

        Raises:
            EngineFailed: the loop is dead, or shows none within the bound after the current step's end.
        """
        if self.failure is not None:
            raise EngineFailed(self.failure)
        progress: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._progress.append(progress)
        self._wake.set()
        if self._asked_at is None:
            self._asked_at = self._clock()
        # Counted from the first question without an answer: once a hang is known, every further check says so at
        # once, and the three failures that Serve wants come quickly.
        overdue_at = max(self._due, self._asked_at) + self._hang_bound_s
        await asyncio.wait([progress], timeout=max(0.0, overdue_at - self._clock()))
        if not progress.done():
            self._progress.remove(progress)
        if self.failure is not None:
            raise EngineFailed(self.failure)
        if not progress.done():
            raise EngineFailed(f"the engine hangs: no step for {self._clock() - self._asked_at:.1f} s")

    async def stop(self) -> None:
        """End the task; what still runs fails."""
        self._task.cancel()
        await asyncio.wait([self._task])
        self._die("the engine was stopped")

    async def _run(self) -> None:
        steps = self._run_curve if self._curve.fixed_service_s is None else self._run_fixed
        try:
            await steps()
        except EngineFailed as error:
            self._die(error.message)
        except Exception as error:  # a bug must reach every caller, not leave them waiting
            logger("scripted_engine").error("engine_broke", exc_info=True)
            self._die(f"the scripted engine broke: {error!r}")

    async def _run_curve(self) -> None:
        """Step after step while something runs; each takes what the curve says."""
        self._due = self._clock()
        while True:
            await self._between_steps()
            prefill = sum(sequence.prefill_tokens for sequence in self._batch.admit())
            if not self._batch.running:
                await self._park()
                self._due = self._clock()
                continue
            step_s = self._curve.step_s(len(self._batch.running), prefill) * self._slow
            now = self._clock()
            self._due = max(self._due, now - MAX_LAG_S) + step_s
            await asyncio.sleep(max(0.0, self._due - now))
            self._batch.step()

    async def _run_fixed(self) -> None:
        """Each sequence comes whole, the fixed service time after its admission; a freed place has no gap."""
        while True:
            await self._between_steps()
            self._admit_fixed(self._clock())
            while (first := self._first_due()) and first.due <= self._clock():
                self._batch.finish(first)
                self._admit_fixed(first.due)
            self._due = first.due if first else self._clock()
            await self._park(first.due if first else None)

    def _first_due(self) -> Sequence | None:
        return min(self._batch.running, key=lambda sequence: sequence.due, default=None)

    def _admit_fixed(self, start: float) -> None:
        service_s = (self._curve.fixed_service_s or 0.0) * self._slow
        for sequence in self._batch.admit():
            sequence.due = start + service_s

    async def _between_steps(self) -> None:
        """Let faults strike that are due; if none stops the loop, that is progress."""
        if self._armed:
            produced = self._batch.output_tokens_total
            for armed in [armed for armed in self._armed if produced >= armed[1]]:
                self._armed.remove(armed)
                await self._strike(armed[0])
        for progress in self._progress:
            if not progress.done():
                progress.set_result(None)
        self._progress.clear()
        self._asked_at = None

    async def _strike(self, fault: ScriptedFault) -> None:
        match fault.kind:
            case FaultKind.SLOW:
                self._slow = fault.factor
            case FaultKind.HANG:
                self._healed.clear()
                await self._healed.wait()
                self._due = self._clock()
            case FaultKind.CRASH:
                raise EngineFailed("the engine crashed (injected fault)")
            case FaultKind.OUT_OF_MEMORY:
                raise EngineFailed("the engine ran out of memory (injected fault)")
            case FaultKind.EXIT:
                os._exit(EXIT_STATUS)

    async def _park(self, until: float | None = None) -> None:
        """Sleep until something is asked of the loop, or until a time on its clock."""
        timer = None if until is None else asyncio.get_running_loop().call_at(until, self._wake.set)
        await self._wake.wait()
        self._wake.clear()
        if timer is not None:
            timer.cancel()

    def _die(self, failure: str) -> None:
        if self.failure is not None:
            return
        self.failure = failure
        for stream in self._streams.values():
            if not stream.ended:
                self._batch.drop(stream)
                stream.end(failure)
        for progress in self._progress:
            if not progress.done():
                progress.set_result(None)
