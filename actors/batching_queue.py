"""`BatchingQueue`: one actor per model that decides who runs next.

Owns the waiting line and the replicas' credit through the pure `Dispatcher`; nothing waits for capacity
anywhere else. Gateways send it commands and read their grants from one open stream each; replicas report to
it twice a second. It is soft state: killed, the next owner learns running work from the replicas and waiting
tickets from the gateways. Prompts and tokens never pass through it.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from actors import telemetry
from actors.handles import frames
from actors.handles.outbox import Outbox
from actors.policies.class_shares import CLASS_WEIGHTS
from actors.policies.decisions import (
    Decision,
    DispatchSettings,
    Granted,
    Lost,
    Outcome,
    Preempted,
    ReplicaReport,
)
from actors.policies.dispatch import Dispatcher
from actors.policies.load import LoadSnapshot
from actors.types import ModelCard, PriorityClass

_SWEEP_S = 0.5
_RATE_WINDOW_S = 10.0
_log = telemetry.logger("batching_queue")


Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class BatchingQueueConfig(BaseModel):
    """Bounds of one model's queue."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    look_ahead: int = Field(
        default=1, ge=0, le=64, description="Sequences granted to a replica beyond what its engine runs."
    )
    silent_after_s: float = Field(
        default=2.0,
        gt=0,
        description="Silence after which a replica gets nothing new, and is given up if another one is there.",
    )
    dead_after_s: float = Field(
        default=15.0, gt=0, description="Silence after which even the only replica is given up."
    )
    max_waiting: int = Field(default=100_000, ge=1, description="Tickets in line; one more is refused.")
    expected_start_up_s: float = Field(
        default=10.0, gt=0, description="Start-up time of a replica until one was measured."
    )
    ttft_slo_s: float = Field(
        default=2.0, gt=0, description="SLO: a request that waits longer is late; more replicas follow."
    )
    tpot_slo_s: float = Field(default=0.2, gt=0, description="SLO: seconds per token of an answer.")
    preempt_batch: bool = Field(
        default=True, description="Running batch requests make room for higher classes and go on later."
    )
    preempt_tenants: bool = Field(
        default=True,
        description="Requests of a tenant that holds more than its share make room for other tenants', twice at most.",
    )
    class_weights: dict[PriorityClass, Weight] = Field(
        default_factory=lambda: dict(CLASS_WEIGHTS),
        description="Share of each class while they all wait; those not named keep their default.",
    )
    tenant_weights: dict[str, Weight] = Field(
        default_factory=dict, description="Share of each tenant within its class; 1 for those not named."
    )


class BatchingQueue:
    """The queue of the model that the application is named for.

    Args:
        model: the model's name, for metrics.
        config: bounds.
        replicas: handle of the pool; unused here, it makes Serve deploy the pool in this application.
    """

    def __init__(self, model: str, config: BatchingQueueConfig, replicas: Any = None) -> None:
        telemetry.configure_logging()
        self._model = model
        self._dispatcher = Dispatcher(settings=DispatchSettings(**config.model_dump()))
        self._gateways: dict[str, Outbox[frames.QueueEvent]] = {}  # by connection: the way back
        self._card: ModelCard | None = None
        self._arrivals: deque[float] = deque()
        self._published: Counter[Outcome] = Counter()
        self._sweeper: asyncio.Task[None] | None = None
        del replicas

    async def grants(self, connection: str) -> AsyncIterator[bytes]:
        """One gateway's grants and refusals, a frame per tick; the open stream is the gateway's life sign."""
        self._ensure_sweeper()
        here = self._gateways[connection] = Outbox[frames.QueueEvent]()
        here.put(frames.Hello(self._card))
        try:
            async for events in here.batches():
                yield frames.encode(events)
        finally:
            self._gateways.pop(connection, None)
            self._deliver(self._dispatcher.gateway_gone(connection, time.monotonic()))

    async def send(self, connection: str, frame: bytes) -> bytes:
        """Take one tick's commands from a gateway, which has one such call under way at a time.

        Args:
            connection: names its stream of grants.
            frame: the commands.

        Returns:
            What there is to tell it at once, as a frame of the stream: where slots are free, its grants.
        """
        now = time.monotonic()
        decisions: list[Decision] = []
        for command in frames.decode_queue_commands(frame):
            decisions += self._apply(command, connection, now)
        self._deliver(decisions)
        here = self._gateways.get(connection)
        return frames.encode(here.take() if here is not None else [])

    async def report(self, frame: bytes) -> None:
        """Take a replica's report; the first one registers it."""
        self._ensure_sweeper()
        report = frames.decode_report(frame)
        if report.card != self._card:
            self._card = report.card
            for gateway in self._gateways.values():
                gateway.put(frames.Hello(report.card))
        known = ReplicaReport(
            replica_id=report.replica_id,
            max_sequences=report.max_sequences,
            kv_tokens=report.kv_tokens,
            running=report.running,
            produced_tokens=report.produced_tokens,
            start_up_s=report.start_up_s,
        )
        self._deliver(self._dispatcher.report(known, time.monotonic()))

    def record_autoscaling_stats(self) -> dict[str, float]:
        """The load of this model, for `app.scaling`."""
        return self.load().to_stats()

    def load(self) -> LoadSnapshot:
        """What waits and runs, in the units of the scaling policy."""
        now = time.monotonic()
        dispatcher, pool = self._dispatcher, self._dispatcher.pool
        self._forget_arrivals(now)
        slots, record = pool.slots_per_replica, dispatcher.record
        per_replica = max(record.concurrency(max_sequences=slots, kv_tokens=pool.kv_tokens_per_replica), 1.0)
        running, ahead = pool.running_sequences(), pool.waiting_ahead_sequences()
        full = record.pace.when_full()  # work is counted at the pace of a full replica
        mean_s = full * dispatcher.estimator.mean_service_s if dispatcher.estimator.observed else 0.0
        return LoadSnapshot(
            queued=len(dispatcher.line) + ahead,
            running=running,
            queued_work_s=(full * dispatcher.line.work_s() + ahead * mean_s) / per_replica,
            running_work_s=running * mean_s / per_replica,
            arrival_rate_rps=len(self._arrivals) / _RATE_WINDOW_S,
            work_per_request_s=mean_s / per_replica,
            oldest_age_s=max(dispatcher.line.oldest_age_s(now, priority) for priority in PriorityClass),
            replica_concurrency=per_replica if slots else 0.0,
            start_up_s=pool.start_up_s or 0.0,
            late_share=record.burn.share(),
        )

    def conservation(self) -> dict[str, int]:
        """The terms of accepted = answered + failed + expired + cancelled + refused + in flight."""
        dispatcher = self._dispatcher
        ended: dict[str, int] = {o: dispatcher.outcomes[o] for o in sorted(dispatcher.outcomes)}
        return {"accepted": dispatcher.accepted, "in_flight": dispatcher.in_flight(), **ended}

    def _apply(self, command: frames.QueueCommand, connection: str, now: float) -> list[Decision]:
        dispatcher = self._dispatcher
        if isinstance(command, frames.Submit):
            if connection not in self._gateways:
                return []  # its grants could not be delivered; it submits again over its next connection
            before = dispatcher.accepted
            decisions = dispatcher.submit(command.ticket, connection, now)
            if dispatcher.accepted > before:  # not one that comes back
                self._arrivals.append(now)
            return decisions
        if isinstance(command, frames.End):
            return dispatcher.end(
                command.request_id, command.outcome, now, output_tokens=command.output_tokens
            )
        if command.draining:
            dispatcher.replica_draining(command.replica_id, now)
            return []
        return dispatcher.replica_gone(command.replica_id, now)

    def _deliver(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            if isinstance(decision, Lost):
                for everyone in self._gateways.values():
                    everyone.put(frames.Lost(decision.replica_id))
                continue
            gateway = self._gateways.get(decision.gateway_id)
            if gateway is None:
                continue  # it left; `gateway_gone` takes care of what it had
            if isinstance(decision, Granted):
                gateway.put(frames.Granted(decision.grant))
            elif isinstance(decision, Preempted):
                gateway.put(frames.Preempted(decision.request_id))
            else:
                gateway.put(frames.Refused(decision.request_id, decision.error.to_wire()))
                telemetry.count("shoal_refused_total", model=self._model, reason=decision.error.code)

    def _ensure_sweeper(self) -> None:
        if self._sweeper is None or self._sweeper.done():
            self._sweeper = asyncio.get_running_loop().create_task(self._sweep())

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            try:
                now = time.monotonic()
                self._deliver(self._dispatcher.sweep(now))
                self._forget_arrivals(now)  # nobody else does where nothing scales
                self._publish(now)
            except Exception:  # a sweeper that is dead would keep dead replicas and stop the metrics
                _log.exception("sweep_failed", model=self._model)

    def _publish(self, now: float) -> None:
        dispatcher = self._dispatcher
        for priority in PriorityClass:
            labels = {"model": self._model, "class_": priority.value}
            telemetry.gauge("shoal_queue_depth", dispatcher.line.count(priority), **labels)
            age_s = dispatcher.line.oldest_age_s(now, priority)
            telemetry.gauge("shoal_queue_oldest_age_seconds", age_s, **labels)
        waits_s, dispatcher.waits_s = dispatcher.waits_s, []
        for priority, wait_s in waits_s:
            telemetry.observe("shoal_queue_wait_seconds", wait_s, model=self._model, class_=priority.value)
        for outcome, total in dispatcher.outcomes.items():
            new = total - self._published[outcome]
            telemetry.count("shoal_tickets_total", new, model=self._model, outcome=outcome)
        self._published = Counter(dispatcher.outcomes)
        telemetry.gauge("shoal_tickets_in_flight", dispatcher.in_flight(), model=self._model)

    def _forget_arrivals(self, now: float) -> None:
        while self._arrivals and now - self._arrivals[0] > _RATE_WINDOW_S:
            self._arrivals.popleft()
