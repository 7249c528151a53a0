"""`LLMReplica`: one engine behind the bus.

Owns one `LLMEngine` and its streams. A gateway opens one bus stream to it and sends coalesced commands; every
engine step leaves as one frame with all of that gateway's new tokens. It reports what it runs to its queue
twice a second and finds out itself when the engine hangs. Who may run on it is the queue's decision.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import psutil
import ray
from ray import serve

from actors import telemetry
from actors.engines.choice import EngineChoice
from actors.engines.gpu_share import SharedCardEngine
from actors.errors import EngineFailed, InvalidRequest, ReplicaGone, ShoalError, Unavailable
from actors.handles import frames
from actors.handles.outbox import Outbox
from actors.handles.queue import QueueReporter
from actors.types import GenerationRequest, ModelCard, TokenDelta

_REPORT_S = 0.5
_WATCH_S = 1.0
_WATCH_FAILURES = 2  # in a row: one may be a stall that ends in the same moment
_OVERTAKEN_S = 30.0  # longer than a command can be under way
# This module is imported when Ray makes the actor, mostly in a process started for it: its age then belongs to
# the start-up. An older process was waiting for work before.
_AGE_AT_IMPORT_S = time.time() - psutil.Process().create_time()
_BOOT_S = _AGE_AT_IMPORT_S if _AGE_AT_IMPORT_S < 30 else 0.0
_log = telemetry.logger("llm_replica")


@dataclass(slots=True)
class _Running:
    """A request in the engine."""

    request_id: str
    produced_tokens: int = 0


@dataclass(slots=True)
class _Connection:
    """One gateway's bus: where its tokens go, and what runs for it."""

    outbox: Outbox[frames.StreamEvent] = field(default_factory=Outbox)
    tasks: dict[int, asyncio.Task[None]] = field(default_factory=dict)  # by stream number
    aborted: set[int] = field(default_factory=set)  # an abort may overtake its start


class LLMReplica:
    """One replica of a model's pool.

    Args:
        model: public name of the model.
        engine: which engine, and its settings.
        cache_dir: where prepared weights are kept.
    """

    async def __init__(self, model: str, engine: EngineChoice, cache_dir: Path) -> None:  # type: ignore[misc]
        telemetry.configure_logging()
        started = time.monotonic()
        context = serve.get_replica_context()
        self._model = model
        self._replica_id = context.replica_id.unique_id
        self._engine = engine.build(model, cache_dir, self._replica_id, _gpus_given(engine))
        self._connections: dict[str, _Connection] = {}
        self._running: dict[tuple[str, int], _Running] = {}  # by connection and stream
        self._failed: EngineFailed | None = None
        self._recovering: asyncio.Task[None] | None = None
        self._card: ModelCard = await self._engine.start()
        self._start_up_s = _BOOT_S + time.monotonic() - started
        self._reporter = QueueReporter(context.app_name)
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._report_for_ever()), loop.create_task(self._watch_engine())]
        _log.info("replica_ready", model=model, replica=self._replica_id, start_up_s=self._start_up_s)

    async def bus(self, connection: str, *, replica: str) -> AsyncIterator[bytes]:
        """The tokens of one gateway's streams, a frame per engine step; its end cancels the streams.

        Args:
            connection: names the bus; `send` refers to it.
            replica: this replica; read by `GrantRouter`.
        """
        del replica
        here = self._connections[connection] = _Connection()
        try:
            yield frames.encode([])  # the gateway may send now
            async for events in here.outbox.batches():
                yield frames.encode(events)
        finally:
            self._connections.pop(connection, None)
            for task in here.tasks.values():
                task.cancel()

    async def send(self, connection: str, frame: bytes, *, replica: str) -> None:
        """Take one tick's commands from a gateway.

        Raises:
            ReplicaGone: its bus is not open here, or not any more.
        """
        del replica
        here = self._connections.get(connection)
        if here is None:
            raise ReplicaGone("the bus is not open")
        for command in frames.decode_replica_commands(frame):
            if isinstance(command, frames.Abort):
                self._abort(here, command.stream)
            elif command.stream not in here.aborted:
                self._start(connection, here, command)
            else:
                here.aborted.discard(command.stream)

    async def check_health(self) -> None:
        """Serve restarts the replica when this raises; an engine that is started again in place is waited for."""
        if self._recovering is not None:
            return
        if self._failed is not None:
            raise self._failed
        await self._engine.check_health()

    async def __del__(self) -> None:
        """Serve awaits this when the replica has drained."""
        for task in (*getattr(self, "_tasks", ()), getattr(self, "_recovering", None)):
            if task is not None:
                task.cancel()
        if hasattr(self, "_engine"):
            await self._engine.stop()

    def _start(self, connection: str, here: _Connection, command: frames.Start) -> None:
        try:
            request = frames.decode_request(command.request)
        except msgspec.ValidationError as error:
            wrong = InvalidRequest(f"the request holds a value that no model takes: {error}")
            here.outbox.put(frames.StreamEvent(command.stream, None, wrong.to_wire()))
            return
        running = self._running[connection, command.stream] = _Running(request.request_id)
        if command.attempt > 1:  # the engine may still know the id from an attempt that is just being stopped
            request = replace(request, request_id=f"{request.request_id}~{command.attempt}")
        task = asyncio.get_running_loop().create_task(self._generate(here, command.stream, request, running))
        here.tasks[command.stream] = task
        task.add_done_callback(lambda _: self._ended(connection, here, command.stream))

    def _abort(self, here: _Connection, stream: int) -> None:
        task = here.tasks.get(stream)
        if task is not None:
            task.cancel()
        else:
            here.aborted.add(stream)
            # Mostly its stream has just ended, and nothing will ever ask.
            asyncio.get_running_loop().call_later(_OVERTAKEN_S, here.aborted.discard, stream)

    def _ended(self, connection: str, here: _Connection, stream: int) -> None:
        here.tasks.pop(stream, None)
        self._running.pop((connection, stream), None)

    async def _generate(
        self, here: _Connection, stream: int, request: GenerationRequest, running: _Running
    ) -> None:
        put = here.outbox.put
        delta: TokenDelta | None = None
        try:
            async for delta in self._engine.generate(request):
                running.produced_tokens += len(delta.token_ids)
                put(frames.StreamEvent(stream, delta))
            if delta is None or delta.usage is None:  # its reader would wait for the rest until the deadline
                raise ShoalError("the engine gave this request up before its answer was complete")  # noqa: TRY301  one road for all errors
        except EngineFailed as error:
            self._engine_died(error)
            put(frames.StreamEvent(stream, None, error.to_wire()))
        except ShoalError as error:
            put(frames.StreamEvent(stream, None, error.to_wire()))
        except Exception:  # an engine's bug must reach its caller as an error, not as silence
            _log.exception("generation_broke", model=self._model, request_id=request.request_id)
            put(frames.StreamEvent(stream, None, ShoalError("the engine broke on this request").to_wire()))

    async def _watch_engine(self) -> None:
        """Find out that the engine hangs before Serve does: its streams need not wait for a new replica."""
        failures = 0
        while True:
            await asyncio.sleep(_WATCH_S)
            if self._failed is not None:
                continue
            try:
                await self._engine.check_health()
                failures = 0
            except EngineFailed as error:
                failures += 1
                if failures == _WATCH_FAILURES:
                    self._give_up(error)
            except Exception:  # a watch that has ended finds nothing
                _log.exception("watch_failed", model=self._model)

    def _give_up(self, error: EngineFailed) -> None:
        """What runs here goes on elsewhere, now."""
        _log.error("engine_failed", model=self._model, reason=error.message)
        self._engine_died(error)
        for here in self._connections.values():
            for stream, task in here.tasks.items():
                here.outbox.put(frames.StreamEvent(stream, None, error.to_wire()))
                task.cancel()

    def _engine_died(self, error: EngineFailed) -> None:
        """No more reports, so no more work; Serve replaces this replica, unless the engine can come back here."""
        self._failed = error
        if isinstance(self._engine, SharedCardEngine) and self._recovering is None:
            self._recovering = asyncio.get_running_loop().create_task(self._recover(self._engine))

    async def _recover(self, engine: SharedCardEngine) -> None:
        """Start the engine again until it runs or is quarantined; that ends it, and a person has to look."""
        while True:
            try:
                if not await engine.recover():
                    telemetry.gauge(
                        "shoal_engine_quarantined", 1, model=self._model, replica=self._replica_id
                    )
                    return  # stays `_recovering`: Serve would only start it again on the same card
            except EngineFailed as error:
                _log.warning("engine_not_recovered", model=self._model, reason=error.message)
            else:
                self._failed = self._recovering = None
                return

    async def _report_for_ever(self) -> None:
        while True:
            if self._failed is None:
                try:
                    await self._report()
                except Exception:  # one that is silent gets no work, for ever
                    _log.exception("report_failed", model=self._model)
            await asyncio.sleep(_REPORT_S)

    async def _report(self) -> None:
        stats = self._engine.stats()
        capacity = self._engine.capacity
        labels = {"model": self._model, "replica": self._replica_id}
        telemetry.gauge("shoal_engine_running", stats.running, **labels)
        telemetry.gauge("shoal_engine_waiting", stats.waiting, **labels)
        telemetry.gauge("shoal_engine_kv_usage", stats.kv_usage, **labels)
        telemetry.gauge("shoal_engine_batch_fill", stats.running / max(capacity.max_sequences, 1), **labels)
        asleep = isinstance(self._engine, SharedCardEngine) and self._engine.asleep
        telemetry.gauge("shoal_engine_asleep", float(asleep), **labels)
        telemetry.gauge("shoal_engine_preemptions_total", stats.preemptions_total, **labels)
        report = frames.Report(
            replica_id=self._replica_id,
            card=self._card,
            max_sequences=capacity.max_sequences,
            kv_tokens=capacity.kv_tokens,
            running=[running.request_id for running in self._running.values()],
            produced_tokens=[running.produced_tokens for running in self._running.values()],
            start_up_s=self._start_up_s,
        )
        try:
            await self._reporter.report(report)
        except Unavailable as error:
            _log.info("queue_unreachable", model=self._model, reason=error.message)


def _gpus_given(engine: EngineChoice) -> float:
    """What Ray gave this replica of a card; asked only where the engine shares one."""
    if engine.share is None:
        return 0.0
    return float(ray.get_runtime_context().get_assigned_resources().get("GPU", 0.0))
