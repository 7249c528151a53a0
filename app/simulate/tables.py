"""The simulator's memory: one row per request, tenant and replica, in arrays that compiled code can walk.

`events` moves it, `pool` owns it and reads it for the policies.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from app.simulate.trace import Trace

OFF, STARTING, READY, DRAINING = 0, 1, 2, 3  # states of a replica

# Columns of `counts`
NEXT, QUEUED, TARGET, LIVE, SERVED, LATE, EXPIRED, ENDED = range(8)
# Columns of `sums`
COUNTED_AT, LIVE_S, TARGET_S, SERVICE_S = range(4)
PACE = 4  # and four more: the sums of `actors.policies.pace`

REQUEST_BITS = 25  # of a heap key: the request; above them, the step at which it ends


class Model(NamedTuple):
    """One replica and the pool around it; a replica is the scripted engine's, see `service_curve`."""

    itl_base_s: float = 0.0065
    itl_per_sequence_s: float = 0.000062
    prefill_tokens_per_s: float = 25_000.0
    max_sequences: int = 64
    kv_tokens: int = 524_288
    look_ahead: int = 1  # sequences granted beyond what the engine runs
    call_s: float = 0.0  # from a free place to the next request in the engine's line
    start_up_s: float = 60.0
    ttft_slo_s: float = 2.0
    tpot_slo_s: float = 0.1
    timeout_s: float = 60.0  # a request that waited longer is answered with an error


class Tables(NamedTuple):
    """All state of a run. Times are seconds of the trace; NaN: not yet."""

    # by request
    arrive: Any
    prompt: Any
    output: Any
    tenant: Any
    granted: Any
    first: Any
    done: Any
    behind: Any  # the next one of its tenant in line, -1: none
    # by tenant
    head: Any  # first in line, -1: none
    tail: Any
    service: Any  # virtual token counter
    # by replica
    state: Any
    next_at: Any  # its next event
    held: Any  # sequences that it was given
    held_tokens: Any
    batch: Any  # sequences that run
    batch_tokens: Any
    base_at: Any  # end of step `base_step`; every later step takes `step_s`
    base_step: Any
    step_s: Any
    ends: Any  # heap per replica: step at which a sequence ends, and which
    line: Any  # granted and not yet in the batch, in order
    line_at: Any  # when each is in the engine's line
    in_line: Any
    # the pool
    counts: Any
    sums: Any


def tables(trace: Trace, *, replicas: int, model: Model) -> Tables:
    """Empty tables for a trace.

    Args:
        trace: what arrives.
        replicas: most that exist at once, draining ones included.
        model: of a replica.
    """
    n, tenants = len(trace), trace.tenants
    width = model.max_sequences + model.look_ahead + 1
    return Tables(
        arrive=np.ascontiguousarray(trace.arrive_s, np.float64),
        prompt=np.ascontiguousarray(trace.prompt_tokens, np.int64),
        output=np.ascontiguousarray(trace.output_tokens, np.int64),
        tenant=np.ascontiguousarray(trace.tenant, np.int64),
        granted=np.full(n, np.nan),
        first=np.full(n, np.nan),
        done=np.full(n, np.nan),
        behind=np.full(n, -1, np.int64),
        head=np.full(tenants, -1, np.int64),
        tail=np.full(tenants, -1, np.int64),
        service=np.zeros(tenants),
        state=np.zeros(replicas, np.int64),
        next_at=np.full(replicas, np.inf),
        held=np.zeros(replicas, np.int64),
        held_tokens=np.zeros(replicas, np.int64),
        batch=np.zeros(replicas, np.int64),
        batch_tokens=np.zeros(replicas, np.int64),
        base_at=np.zeros(replicas),
        base_step=np.zeros(replicas, np.int64),
        step_s=np.zeros(replicas),
        ends=np.zeros((replicas, width), np.int64),
        line=np.zeros((replicas, width), np.int64),
        line_at=np.zeros((replicas, width)),
        in_line=np.zeros(replicas, np.int64),
        counts=np.zeros(8, np.int64),
        sums=np.zeros(9),
    )
