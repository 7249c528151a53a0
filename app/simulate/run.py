"""One run: a trace through a pool under a policy, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from app.simulate.policies import Policy
from app.simulate.pool import Pool
from app.simulate.tables import LIVE_S, TARGET_S, Model
from app.simulate.trace import Trace

_MOST_TAIL_S = 3600.0  # after the load: the pool goes back to its least


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The pool's."""

    min_replicas: int = 1
    max_replicas: int = 24
    first_replicas: int = 1  # ready at the beginning
    warm_up_s: float = 0.0  # of the trace, before anything counts
    until_least: bool = False  # count on after the load until the pool is at its least


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """What one run gave."""

    policy: str
    attainment: float  # share of requests within both SLOs
    mean_replicas: float  # that cost: starting, ready and draining ones
    mean_target: float  # ready and starting ones, as Kubernetes counts
    replica_s: float
    ttft_mean_s: float
    ttft_p99_s: float
    reversals_per_h: float
    scale_lag_s: float  # mean time that wanted replicas were not yet ready, per replica added
    requests: int
    series: Any  # rows of (time, target, ready, live, queued, running)


def simulate(trace: Trace, model: Model, policy: Policy, bounds: Bounds) -> Result:
    """Run a policy on a trace.

    Args:
        trace: what arrives.
        model: of a replica.
        policy: a fresh one.
        bounds: of the pool.
    """
    pool = Pool(trace, model, max_replicas=bounds.max_replicas, first_replicas=bounds.first_replicas)
    rows: list[tuple[float, ...]] = []
    spent = np.zeros(2)
    ends = trace.duration_s
    now, scored = 0.0, bounds.warm_up_s <= 0.0
    while now < ends or (
        bounds.until_least and pool.target > bounds.min_replicas and now < ends + _MOST_TAIL_S
    ):
        now += policy.every_s
        if not scored and now >= bounds.warm_up_s:
            pool.advance(bounds.warm_up_s)
            spent, scored = -pool.t.sums[[LIVE_S, TARGET_S]], True
        pool.advance(now)
        wanted = min(max(policy.decide(pool), bounds.min_replicas), bounds.max_replicas)
        if wanted != pool.target:
            pool.scale_to(wanted)
        rows.append((now, wanted, pool.ready, pool.live, pool.queued, pool.running))
    spent = spent + pool.t.sums[[LIVE_S, TARGET_S]]
    pool.advance(now + model.timeout_s * 10.0)
    took = _Took(series=np.array(rows), spent_s=spent, seconds=now - bounds.warm_up_s)
    return _result(policy.name, pool, took, bounds)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Took:
    """What a run used."""

    series: Any
    spent_s: Any  # replica-seconds: those that cost, and those that were wanted
    seconds: float  # that counted


def _result(name: str, pool: Pool, took: _Took, bounds: Bounds) -> Result:
    series, spent, seconds = took.series, took.spent_s, took.seconds
    t, m = pool.t, pool.model
    counted = t.arrive >= bounds.warm_up_s
    ttft = (t.first - t.arrive)[counted]
    output = t.output[counted]
    tpot = (t.done - t.first)[counted] / np.maximum(output - 1, 1)
    within = (ttft <= m.ttft_slo_s) & ((tpot <= m.tpot_slo_s + 1e-9) | (output <= 1))
    answered = ttft[np.isfinite(ttft)]
    targets = series[series[:, 0] >= bounds.warm_up_s, 1]
    moves = np.diff(targets)
    moves = moves[moves != 0]
    added = float(np.maximum(np.diff(series[:, 1], prepend=bounds.first_replicas), 0).sum())
    every_s = float(series[1, 0] - series[0, 0]) if len(series) > 1 else 0.0
    missing = float(np.maximum(series[:, 1] - series[:, 2], 0).sum()) * every_s
    return Result(
        policy=name,
        attainment=float(within.mean()),
        mean_replicas=float(spent[0]) / seconds,
        mean_target=float(spent[1]) / seconds,
        replica_s=float(spent[0]),
        ttft_mean_s=float(answered.mean()) if answered.size else float("nan"),
        ttft_p99_s=float(np.quantile(answered, 0.99)) if answered.size else float("nan"),
        reversals_per_h=float(np.count_nonzero(np.sign(moves[1:]) != np.sign(moves[:-1]))) / seconds * 3600.0,
        scale_lag_s=missing / added if added else 0.0,
        requests=int(counted.sum()),
        series=series,
    )
