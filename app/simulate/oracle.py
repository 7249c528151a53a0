"""What cannot be beaten: a clairvoyant plan by dynamic programming, and a proved lower bound.

Both know every request beforehand. The plan is one that a pool could follow, proved by a run in the same simulator,
so the least possible cost lies between the bound and it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from app.simulate.policies import Schedule
from app.simulate.run import Bounds, Result, simulate
from app.simulate.tables import Model
from app.simulate.trace import Trace

INTERVAL_S = 30.0  # of the plan
_GRID_S = 2.0  # at which demand is looked at
_MARGINS = (0.9, 1.4)  # between which the plan's demand is scaled
_HALVINGS = 5


def work_s(trace: Trace, model: Model) -> Any:
    """Seconds of a full replica that each request takes: its prefill, and its tokens' share of full steps."""
    width = _width(trace, model)
    per_token_s = model.itl_base_s / width + model.itl_per_sequence_s
    return trace.prompt_tokens / model.prefill_tokens_per_s + trace.output_tokens * per_token_s


def demand(trace: Trace, model: Model, grid_s: float = _GRID_S) -> Any:
    """Full replicas that the requests would keep busy if none ever waited, on a grid of time.

    Each request's work lies evenly over the time that it stays on a full replica.
    """
    width, work = _width(trace, model), work_s(trace, model)
    stay_s = np.maximum(work * width, grid_s)
    bins = int(np.ceil((trace.duration_s + 1.0) / grid_s)) + 1
    begin = np.minimum((trace.arrive_s / grid_s).astype(int), bins - 1)
    end = np.minimum(((trace.arrive_s + stay_s) / grid_s).astype(int), bins - 1)
    change = np.bincount(begin, work / stay_s, bins) - np.bincount(end, work / stay_s, bins)
    return np.maximum(np.cumsum(change)[:-1], 0.0)


def lower_bound_s(trace: Trace, model: Model, *, attainment: float, begin_s: float, end_s: float) -> float:
    """Replica-seconds within [begin, end) that no scaling and no scheduling can do without.

    Proof. A step with b sequences takes base + slope * b, and the prefill of its new ones on top: it is busy for
    exactly the sum of these. At most B sequences share a step, so base >= base * b / B: each token costs its replica
    at least base / B + slope. At most K tokens of memory are held in it, so base >= base * (sum of held tokens) / K
    as well; a request of k tokens then costs base * k / K + slope per token. Each of the two (not the larger one
    request by request) therefore bounds the busy time from below by a sum of one fixed cost w per request that is
    served, and prefill adds p / P in both. A replica that is busy exists, so replica-seconds are at least the sum
    of w over the served requests. A request that came at a with o tokens and was within its SLOs has ended by
    a + TTFT + (o - 1) * TPOT. Of N requests at least x N were; those that might end after `end` or came before
    `begin` are taken as free; of the others, leaving out the dearest (1 - x) N leaves the least possible sum.

    Args:
        trace: what arrives.
        model: of a replica.
        attainment: x, the share of the requests within their SLOs.
        begin_s: of what counts.
        end_s: of what counts.
    """
    prefill = trace.prompt_tokens / model.prefill_tokens_per_s
    held = trace.prompt_tokens + trace.output_tokens
    last_s = trace.arrive_s + model.ttft_slo_s + (trace.output_tokens - 1) * model.tpot_slo_s
    counted = trace.arrive_s >= begin_s
    spared = int((1.0 - attainment) * np.count_nonzero(counted))
    within = counted & (last_s <= end_s)
    sums = []
    for share in (1.0 / model.max_sequences, held / model.kv_tokens):
        cost = prefill + trace.output_tokens * (model.itl_base_s * share + model.itl_per_sequence_s)
        ordered = np.sort(cost[within])
        sums.append(float(ordered[: max(len(ordered) - spared, 0)].sum()))
    return max(sums)


def plan(need: Any, *, start_up_s: float, interval_s: float, bounds: Bounds) -> list[int]:
    """The cheapest whole replicas over time that are at least what is needed in each interval.

    Dynamic programming over the number of replicas: an interval costs n * interval, one more replica its start-up.

    Args:
        need: least replicas per interval.
        start_up_s: paid for each replica that is added.
        interval_s: length of one.
        bounds: of the pool.
    """
    most = bounds.max_replicas
    counts = np.arange(most + 1)
    step = np.maximum(counts[None, :] - counts[:, None], 0) * start_up_s  # from row to column
    allowed = np.minimum(np.maximum(need, bounds.min_replicas), most)
    cost = np.where(counts >= allowed[0], counts * interval_s, np.inf)
    came_from = np.zeros((len(allowed), most + 1), np.int64)
    for at in range(1, len(allowed)):
        total = cost[:, None] + step
        came_from[at] = np.argmin(total, axis=0)
        cost = total[came_from[at], counts] + counts * interval_s
        cost[counts < allowed[at]] = np.inf
    chosen = [int(np.argmin(cost))]
    for at in range(len(allowed) - 1, 0, -1):
        chosen.append(int(came_from[at][chosen[-1]]))
    return chosen[::-1]


def oracle(trace: Trace, model: Model, bounds: Bounds, *, attainment: float = 0.99) -> Result:
    """The cheapest run found that knows the future and keeps the attainment.

    The mean demand of each interval is scaled by a margin; bisection finds the least one with which the plan, run in
    the simulator, keeps the attainment.
    """
    found: list[Result] = []
    need = _per_interval(demand(trace, model))
    low, high = _MARGINS
    for _ in range(_HALVINGS):
        margin = (low + high) / 2.0
        result = _run_plan(trace, model, bounds, np.ceil(need * margin - 1e-9))
        if result.attainment >= attainment:
            high = margin
            found.append(result)
        else:
            low = margin
    if not found:
        everything = np.full(len(need), bounds.max_replicas)
        found.append(_run_plan(trace, model, bounds, everything))
    return min(found, key=lambda result: result.replica_s)


def _run_plan(trace: Trace, model: Model, bounds: Bounds, need: Any) -> Result:
    chosen = plan(need, start_up_s=model.start_up_s, interval_s=INTERVAL_S, bounds=bounds)
    schedule = Schedule("oracle", chosen, INTERVAL_S, model.start_up_s)
    return simulate(trace, model, schedule, bounds)


def _per_interval(grid: Any) -> Any:
    per = int(INTERVAL_S / _GRID_S)
    padded = np.concatenate([grid, np.full(-len(grid) % per, grid[-1])])
    return padded.reshape(-1, per).mean(axis=1)


def _width(trace: Trace, model: Model) -> float:
    """c*: sequences of a full replica."""
    mean = float(np.mean(trace.prompt_tokens + trace.output_tokens))
    return float(min(model.max_sequences, max(model.kv_tokens / mean, 1.0)))
