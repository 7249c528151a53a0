"""The load of a pool as its queue measures it: the values that actors record and the scaling policy reads.

Pure. Whoever has a queue of its own (`BatchingQueue`, `Embedder`, `Retriever`, `JobRunner`) returns
`LoadSnapshot(...).to_stats()` from `record_autoscaling_stats`; `app.scaling` reads it back and merges the
replicas. What follows from the load is `actors.policies.autoscaling`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

LEAST_WORK_S = 1e-6  # a mean below is no measurement
_LEAST_WEIGHT = 1e-12  # below, products lose their digits


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadSnapshot:
    """What a queue measures; its fields are the keys of `record_autoscaling_stats`.

    Work is counted in seconds of one full replica: tokens over the throughput of a replica that runs c*
    sequences at once. Slot-seconds divided by c* are the same.
    """

    queued: float = 0.0  # sequences that wait
    running: float = 0.0  # sequences that hold a slot
    queued_work_s: float = 0.0  # work of what waits
    running_work_s: float = 0.0  # work of what runs, each counted in full until it ends
    arrival_rate_rps: float = 0.0  # requests per second, refused ones included
    work_per_request_s: float = 0.0  # mean work of one request; 0: not measured yet
    oldest_age_s: float = 0.0  # longest wait of a request that still waits
    replica_concurrency: float = 0.0  # c*, sequences; 0: no replica was ever seen
    start_up_s: float = 0.0  # measured start-up time of a replica; 0: not measured yet
    late_share: float = 0.0  # of the requests of the last minute, those that missed an SLO

    def __post_init__(self) -> None:
        """Refuse what is no measurement: a wrong number here would start or end real machines."""
        for field in fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value >= 0.0):
                raise ValueError(f"{field.name} must be a finite number >= 0, not {value!r}")

    @classmethod
    def from_stats(cls, stats: Mapping[str, float]) -> LoadSnapshot:
        """Read recorded stats; other keys are ignored.

        Raises:
            ValueError: a key is missing, or its value is negative or not finite.
        """
        names = [field.name for field in fields(cls)]
        missing = [name for name in names if name not in stats]
        if missing:
            raise ValueError(f"the recorded stats lack {', '.join(missing)}")
        return cls(**{name: float(stats[name]) for name in names})

    def to_stats(self) -> dict[str, float]:
        """The flat dict that `record_autoscaling_stats` returns."""
        return {name: float(value) for name, value in asdict(self).items()}

    def has_work(self) -> bool:
        """Does anything wait or run?"""
        return self.queued > 0.0 or self.running > 0.0


def merge(snapshots: Sequence[LoadSnapshot], *, one_backlog: bool) -> LoadSnapshot:
    """The load of a pool whose replicas each recorded their own.

    Args:
        snapshots: one per replica, at least one.
        one_backlog: every replica sees the same queue, so what waits is not added up; what runs always is.
    """
    waiting = max if one_backlog else math.fsum
    rates = [s.arrival_rate_rps for s in snapshots]
    return LoadSnapshot(
        queued=waiting([s.queued for s in snapshots]),
        running=math.fsum(s.running for s in snapshots),
        queued_work_s=waiting([s.queued_work_s for s in snapshots]),
        running_work_s=math.fsum(s.running_work_s for s in snapshots),
        arrival_rate_rps=waiting(rates),
        work_per_request_s=_mean([s.work_per_request_s for s in snapshots], rates),
        oldest_age_s=max(s.oldest_age_s for s in snapshots),
        replica_concurrency=_mean([s.replica_concurrency for s in snapshots], []),
        start_up_s=max(s.start_up_s for s in snapshots),
        late_share=max(s.late_share for s in snapshots),
    )


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    """Weighted mean of what was measured (zero: it was not); the plain mean while all weights are zero."""
    known = [(v, w) for v, w in zip(values, weights or [0.0] * len(values), strict=True) if v > 0.0]
    total = math.fsum(w for _, w in known)
    if total > _LEAST_WEIGHT:
        return math.fsum(v * w for v, w in known) / total
    return math.fsum(v for v, _ in known) / max(len(known), 1)
