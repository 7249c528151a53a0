"""The simulator's inner loop: requests arrive, wait, run in batches and end.

The line is `BatchingQueue`'s: one for the pool, by virtual token counters of the tenants, and its head waits until
it fits; a replica with a free place comes before one with room in its engine's line, then the least loaded. An
engine is the scripted one: a step takes ITL(batch) and the prefill of those who joined with it, each running
sequence gets one token per step, and sequences join and leave between steps only. Steps in which nobody does are
never looked at: the next event of a replica is computed from its batch. Scaling is `fleet`'s.
"""

from __future__ import annotations

import math

from app.simulate.compiled import compiled
from app.simulate.heap import pop, push
from app.simulate.tables import (
    COUNTED_AT,
    DRAINING,
    ENDED,
    EXPIRED,
    LATE,
    LIVE,
    LIVE_S,
    NEXT,
    OFF,
    PACE,
    QUEUED,
    READY,
    REQUEST_BITS,
    SERVED,
    SERVICE_S,
    STARTING,
    TARGET,
    TARGET_S,
    Model,
    Tables,
)

_SMOOTHING = 0.1  # of the mean service time, as in `ServiceEstimator`
_PACE_MEMORY = 0.998  # as in `pace`
_EPSILON_S = 1e-9  # two times nearer than this are one
_OUTPUT_WEIGHT = 2.0  # of an output token against one of the prompt, as in `virtual_counters`


@compiled
def advance(t: Tables, m: Model, until: float) -> None:
    """Let everything happen up to and including `until`."""
    requests, replicas = len(t.arrive), len(t.state)
    while True:
        r, at = -1, math.inf
        for k in range(replicas):
            if t.next_at[k] < at:
                r, at = k, t.next_at[k]
        i = t.counts[NEXT]
        arrives = t.arrive[i] if i < requests else math.inf
        if min(at, arrives) > until:
            break
        if arrives <= at:
            t.counts[NEXT] += 1
            join(t, i)
            dispatch(t, m, arrives)
        else:
            happen(t, m, r, at)
    settle(t, until)


@compiled
def settle(t: Tables, now: float) -> None:
    """Add up replica-seconds until now."""
    passed = now - t.sums[COUNTED_AT]
    t.sums[LIVE_S] += passed * t.counts[LIVE]
    t.sums[TARGET_S] += passed * t.counts[TARGET]
    t.sums[COUNTED_AT] = now


@compiled
def join(t: Tables, i: int) -> None:
    """Request i takes its place in its tenant's line; who had none does not come with old credit."""
    tenant = t.tenant[i]
    if t.head[tenant] >= 0:
        t.behind[t.tail[tenant]] = i
    else:
        if t.counts[QUEUED] > 0:
            least = math.inf
            for k in range(len(t.head)):
                if t.head[k] >= 0:
                    least = min(least, t.service[k])
            t.service[tenant] = max(t.service[tenant], least)
        t.head[tenant] = i
    t.tail[tenant] = i
    t.counts[QUEUED] += 1


@compiled
def dispatch(t: Tables, m: Model, now: float) -> None:
    """Grant from the head of the line for as long as it fits somewhere."""
    while t.counts[QUEUED] > 0:
        tenant = -1
        for k in range(len(t.head)):
            if t.head[k] >= 0 and (tenant < 0 or t.service[k] < t.service[tenant]):
                tenant = k
        i = t.head[tenant]
        late = now - t.arrive[i] > m.timeout_s
        r = -1 if late else choose(t, m, t.prompt[i] + t.output[i])
        if r < 0 and not late:
            return
        t.head[tenant] = t.behind[i]
        t.counts[QUEUED] -= 1
        if late:
            t.counts[EXPIRED] += 1
            t.counts[SERVED] += 1
            t.counts[LATE] += 1
            continue
        t.service[tenant] += t.prompt[i] + _OUTPUT_WEIGHT * t.output[i]
        t.granted[i] = now
        t.held[r] += 1
        t.held_tokens[r] += t.prompt[i] + t.output[i]
        place = t.in_line[r]
        t.line[r, place] = i
        t.line_at[r, place] = now + m.call_s
        t.in_line[r] += 1
        plan(t, m, r)


@compiled
def choose(t: Tables, m: Model, tokens: int) -> int:
    """The replica for a request of so many tokens; -1: it fits nowhere."""
    best, best_load = -1, math.inf
    for r in range(len(t.state)):
        if t.state[r] != READY:
            continue
        fits = t.held[r] == 0 or (
            t.held[r] < m.max_sequences + m.look_ahead and t.held_tokens[r] + tokens <= m.kv_tokens
        )
        if not fits:
            continue
        load = max(t.held[r] / m.max_sequences, t.held_tokens[r] / m.kv_tokens)
        if t.held[r] >= m.max_sequences:
            load += 2.0  # it would wait in the engine
        if load < best_load:
            best, best_load = r, load
    return best


@compiled
def has_room(t: Tables, m: Model, r: int) -> bool:
    """Can the first in an engine's line join its batch?"""
    if t.batch[r] >= m.max_sequences:
        return False
    i = t.line[r, 0]
    return bool(t.batch[r] == 0 or t.batch_tokens[r] + t.prompt[i] + t.output[i] <= m.kv_tokens)


@compiled
def plan(t: Tables, m: Model, r: int) -> None:
    """When does something happen next on a replica: a sequence ends, or one joins?"""
    at = math.inf
    if t.batch[r] > 0:
        step = t.ends[r, 0] >> REQUEST_BITS
        at = t.base_at[r] + (step - t.base_step[r]) * t.step_s[r]
    if t.in_line[r] > 0 and has_room(t, m, r):
        joins = t.line_at[r, 0]
        if t.batch[r] > 0:
            steps = math.ceil((joins - t.base_at[r] - _EPSILON_S) / t.step_s[r])
            joins = t.base_at[r] + max(steps, 0) * t.step_s[r]
        at = min(at, joins)
    t.next_at[r] = at


@compiled
def happen(t: Tables, m: Model, r: int, now: float) -> None:
    """The event of a replica: it has started, or a step has ended after which its batch changes."""
    if t.state[r] == STARTING:
        t.state[r] = READY
        t.next_at[r] = math.inf
        dispatch(t, m, now)
        return
    step = t.base_step[r]
    if t.batch[r] > 0:
        step += round((now - t.base_at[r]) / t.step_s[r])
    while t.batch[r] > 0 and t.ends[r, 0] >> REQUEST_BITS <= step:
        finish(t, m, r, now)
    dispatch(t, m, now)
    admit(t, m, r, step, now)
    if t.state[r] == DRAINING and t.held[r] == 0:
        settle(t, now)
        t.state[r] = OFF
        t.counts[LIVE] -= 1
        t.next_at[r] = math.inf
    else:
        plan(t, m, r)


@compiled
def finish(t: Tables, m: Model, r: int, now: float) -> None:
    """The sequence that ends first leaves the batch."""
    i = pop(t.ends[r], t.batch[r]) & ((1 << REQUEST_BITS) - 1)
    t.done[i] = now
    tokens = t.prompt[i] + t.output[i]
    service_s = now - t.granted[i]
    learn(
        t, service_s, t.output[i], min(max(t.held[r] / m.max_sequences, t.held_tokens[r] / m.kv_tokens), 1.0)
    )
    t.batch[r] -= 1
    t.batch_tokens[r] -= tokens
    t.held[r] -= 1
    t.held_tokens[r] -= tokens
    t.counts[SERVED] += 1
    t.counts[ENDED] += 1
    slow = now - t.first[i] > m.tpot_slo_s * (t.output[i] - 1) + _EPSILON_S
    if slow or t.first[i] - t.arrive[i] > m.ttft_slo_s:
        t.counts[LATE] += 1
    weight = max(_SMOOTHING, 1.0 / t.counts[ENDED])
    t.sums[SERVICE_S] += weight * (service_s - t.sums[SERVICE_S])


@compiled
def learn(t: Tables, service_s: float, tokens: int, load: float) -> None:
    """`Pace.observe` in compiled code."""
    for k in range(PACE, PACE + 5):
        t.sums[k] *= _PACE_MEMORY
    t.sums[PACE] += tokens
    t.sums[PACE + 1] += tokens * load
    t.sums[PACE + 2] += service_s
    t.sums[PACE + 3] += tokens * load * load
    t.sums[PACE + 4] += service_s * load


@compiled
def admit(t: Tables, m: Model, r: int, step: int, now: float) -> None:
    """Let those join who are in the engine's line and fit; the step that begins prefills them."""
    joined, prefill = 0, 0
    while t.in_line[r] > 0 and t.line_at[r, 0] <= now + _EPSILON_S and has_room(t, m, r):
        i = t.line[r, 0]
        for k in range(1, t.in_line[r]):
            t.line[r, k - 1] = t.line[r, k]
            t.line_at[r, k - 1] = t.line_at[r, k]
        t.in_line[r] -= 1
        push(t.ends[r], t.batch[r], ((step + t.output[i]) << REQUEST_BITS) | i)
        t.batch[r] += 1
        t.batch_tokens[r] += t.prompt[i] + t.output[i]
        t.first[i] = -1.0
        prefill += t.prompt[i]
        joined += 1
    t.step_s[r] = m.itl_base_s + m.itl_per_sequence_s * t.batch[r]
    t.base_step[r] = step + 1
    t.base_at[r] = now + t.step_s[r] + prefill / m.prefill_tokens_per_s
    if joined > 0:
        mask = (1 << REQUEST_BITS) - 1
        for k in range(t.batch[r]):
            i = t.ends[r, k] & mask
            if t.first[i] < 0.0:
                t.first[i] = t.base_at[r]
