"""Names of metrics, stages and log actions, and the clock that makes a request's time add up.

Owns the one table of metric names and labels (observability.md), the structlog configuration and
`StageClock`. Every actor calls it; what a number means for a decision is left to the policies.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Literal

import structlog
from ray.util import metrics

Stage = Literal["auth", "cache", "queue", "embed", "retrieve", "rerank", "prefill", "decode", "other"]
STAGES: tuple[Stage, ...] = (
    "auth", "cache", "queue", "embed", "retrieve", "rerank", "prefill", "decode", "other",
)  # fmt: skip

_SECONDS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)

# name: (kind, description, labels). Labels never carry a key or a prompt.
_METRICS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "shoal_stage_seconds": ("histogram", "Time of one request in one stage", ("stage", "model")),
    "shoal_request_seconds": ("histogram", "Wall time of one request", ("route", "model", "status")),
    "shoal_ttft_seconds": ("histogram", "Time to the first token", ("model", "class")),
    "shoal_requests_total": ("counter", "Requests answered, by status", ("route", "model", "status")),
    "shoal_tokens_total": ("counter", "Tokens, by direction", ("model", "direction")),
    "shoal_queue_depth": ("gauge", "Tickets waiting", ("model", "class")),
    "shoal_queue_oldest_age_seconds": ("gauge", "Age of the oldest waiting ticket", ("model", "class")),
    "shoal_queue_wait_seconds": ("histogram", "Wait in the queue until a grant", ("model", "class")),
    "shoal_tickets_total": ("counter", "Tickets by outcome: the conservation sum", ("model", "outcome")),
    "shoal_tickets_in_flight": ("gauge", "Tickets waiting or running", ("model",)),
    "shoal_refused_total": ("counter", "Requests refused before they ran", ("model", "reason")),
    "shoal_resumed_total": ("counter", "Answers that went on after their replica failed", ("model",)),
    "shoal_hedges_total": ("counter", "Requests started twice, their first token overdue", ("model",)),
    "shoal_preemptions_total": (
        "counter",
        "Batch answers that gave their slot to a higher class",
        ("model",),
    ),
    "shoal_engine_running": ("gauge", "Sequences in the engine's batch", ("model", "replica")),
    "shoal_engine_waiting": ("gauge", "Sequences in the engine's own waiting list", ("model", "replica")),
    "shoal_engine_kv_usage": ("gauge", "Share of the KV cache in use", ("model", "replica")),
    "shoal_engine_batch_fill": ("gauge", "Running sequences over the most allowed", ("model", "replica")),
    "shoal_engine_asleep": ("gauge", "1 while its memory is lent to others", ("model", "replica")),
    "shoal_engine_quarantined": ("gauge", "1 once it died too often", ("model", "replica")),
    "shoal_engine_preemptions_total": ("gauge", "Preemptions since start", ("model", "replica")),
    "shoal_retrieval_degraded_total": ("counter", "Answers with less context than asked", ("reason",)),
    "shoal_jobs_total": ("counter", "Durable jobs ended, by outcome", ("kind", "outcome")),
}


@cache
def _metric(name: str) -> Any:
    kind, description, labels = _METRICS[name]
    if kind == "histogram":
        return metrics.Histogram(name, description=description, boundaries=list(_SECONDS), tag_keys=labels)
    cls = metrics.Counter if kind == "counter" else metrics.Gauge
    return cls(name, description=description, tag_keys=labels)


def count(name: str, amount: float = 1.0, **labels: str) -> None:
    """Add to a counter of the table."""
    if amount > 0:
        _metric(name).inc(amount, tags=_tags(labels))


def gauge(name: str, value: float, **labels: str) -> None:
    """Set a gauge of the table."""
    _metric(name).set(value, tags=_tags(labels))


def observe(name: str, value_s: float, **labels: str) -> None:
    """Record one duration in a histogram of the table."""
    _metric(name).observe(max(value_s, 0.0), tags=_tags(labels))


def _tags(labels: Mapping[str, str]) -> dict[str, str]:
    # `class` is a keyword in Python: callers write class_.
    return {name.rstrip("_"): value for name, value in labels.items()}


class StageClock:
    """Attributes every moment of a request to exactly one stage, so the stages add up to the wall time.

    The request is always in one stage; `enter` ends the current one. Stages that another actor measured are
    cut out of the current one with `split`.

    Args:
        now: monotonic clock in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._started = self._since = now()
        self._stage: Stage = "other"
        self._spent_s: dict[Stage, float] = {}

    def enter(self, stage: Stage) -> None:
        """End the current stage and start `stage`."""
        now = self._now()
        self._spent_s[self._stage] = self._spent_s.get(self._stage, 0.0) + now - self._since
        self._stage, self._since = stage, now

    def split(self, parts_s: Mapping[Stage, float]) -> None:
        """Give parts of the time since the last `enter` to other stages; the rest stays with the current.

        Parts that exceed the time that really passed are scaled down: the sum is always the wall time.
        """
        elapsed = self._now() - self._since
        total = sum(parts_s.values())
        scale = min(1.0, elapsed / total) if total > 0 else 0.0
        for stage, spent in parts_s.items():
            self._spent_s[stage] = self._spent_s.get(stage, 0.0) + spent * scale
        self._since += total * scale

    def stages_s(self) -> dict[Stage, float]:
        """Seconds by stage up to now, in the order of `STAGES`; the sum is `elapsed_s()`."""
        running = self._now() - self._since
        return {
            stage: self._spent_s.get(stage, 0.0) + (running if stage == self._stage else 0.0)
            for stage in STAGES
            if stage in self._spent_s or stage == self._stage
        }

    def elapsed_s(self) -> float:
        """Wall time since the clock was made."""
        return self._now() - self._started

    def server_timing(self) -> str:
        """The `Server-Timing` header: `queue;dur=12.3, prefill;dur=40.1` in milliseconds."""
        return ", ".join(f"{stage};dur={spent * 1e3:.2f}" for stage, spent in self.stages_s().items())

    def record(self, model: str) -> None:
        """Write the stages to `shoal_stage_seconds`."""
        for stage, spent in self.stages_s().items():
            observe("shoal_stage_seconds", spent, stage=stage, model=model)


def configure_logging(level: int = logging.INFO) -> None:
    """Structured JSON log lines on stderr; each carries a stable `action` key. Call once per process."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.EventRenamer("action"),
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
        cache_logger_on_first_use=False,  # log lines are rare, and tests must be able to look at them
    )


def logger(component: str) -> Any:
    """A logger whose first argument is the action: `log.info("replica_registered", replica=...)`."""
    return structlog.get_logger(component=component)
