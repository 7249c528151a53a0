"""One simulated pool: a trace, its tables, and what a scaling policy may see of them.

A policy sees what the running system measures (`actors.policies.load`) and, for laws that scale on latency, the
requests of the last minutes as far as they have come. Nobody but the oracle sees the future.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from actors.policies.burn import Burn
from actors.policies.load import LoadSnapshot
from actors.policies.pace import Pace
from app.simulate.events import advance, settle
from app.simulate.tables import (
    DRAINING,
    LATE,
    LIVE,
    NEXT,
    OFF,
    PACE,
    QUEUED,
    READY,
    SERVED,
    SERVICE_S,
    STARTING,
    TARGET,
    Model,
    tables,
)
from app.simulate.trace import Trace

_RATE_WINDOW_S = 10.0  # of the arrival rate, as in `BatchingQueue`
_SPARE_REPLICAS = 2  # a pool twice its bound drains at most so many more at once


class Pool:
    """A pool under a trace.

    Args:
        trace: what arrives.
        model: of a replica.
        max_replicas: most that a policy may want.
        first_replicas: ready at the beginning.
    """

    def __init__(self, trace: Trace, model: Model, *, max_replicas: int, first_replicas: int) -> None:
        self.model = model
        self.now = 0.0
        self.t = tables(trace, replicas=2 * max_replicas + _SPARE_REPLICAS, model=model)
        self.t.state[:first_replicas] = READY
        self.t.counts[TARGET] = self.t.counts[LIVE] = first_replicas
        self._burn = Burn()
        self._counted = (0, 0)  # served and late ones that are in it

    @property
    def target(self) -> int:
        """Replicas that are wanted: ready or starting."""
        return int(self.t.counts[TARGET])

    @property
    def live(self) -> int:
        """Replicas that cost: draining ones, too."""
        return int(self.t.counts[LIVE])

    @property
    def ready(self) -> int:
        """Replicas that take requests."""
        return int(np.count_nonzero(self.t.state == READY))

    @property
    def running(self) -> int:
        """Sequences that hold a place."""
        return int(np.minimum(self.t.held, self.model.max_sequences).sum())

    @property
    def queued(self) -> int:
        """Sequences that wait, in the line or in an engine's."""
        ahead = np.maximum(self.t.held - self.model.max_sequences, 0).sum()
        return int(self.t.counts[QUEUED] + ahead)

    def advance(self, until_s: float) -> None:
        """Let the trace go on."""
        advance(self.t, self.model, until_s)
        self.now = until_s

    def scale_to(self, target: int) -> None:
        """Order replicas, or stop some: those that still start first, then the emptiest; they drain."""
        t, now = self.t, self.now
        settle(t, now)
        off = np.flatnonzero(t.state == OFF)
        for r in off[: max(target - self.target, 0)]:
            t.state[r], t.next_at[r] = STARTING, now + self.model.start_up_s
            t.counts[LIVE] += 1
            t.counts[TARGET] += 1
        while t.counts[TARGET] > target:
            self._stop_one()

    def _stop_one(self) -> None:
        t = self.t
        starting = np.flatnonzero(t.state == STARTING)
        if starting.size:
            r = int(starting[np.argmax(t.next_at[starting])])
        else:
            ready = np.flatnonzero(t.state == READY)
            r = int(ready[np.argmin(t.held[ready])])
        t.counts[TARGET] -= 1
        if t.state[r] == READY and t.held[r] > 0:
            t.state[r] = DRAINING
        else:
            t.state[r], t.next_at[r] = OFF, np.inf
            t.counts[LIVE] -= 1

    def concurrency(self) -> float:
        """c*: sequences that a replica runs when it is full, as places or memory bind."""
        seen = int(self.t.counts[NEXT])
        recent = slice(max(seen - 1000, 0), max(seen, 1))
        mean_tokens = float(np.mean(self.t.prompt[recent] + self.t.output[recent]))
        return float(min(self.model.max_sequences, max(self.model.kv_tokens / mean_tokens, 1.0)))

    def snapshot(self) -> LoadSnapshot:
        """What the queue would record now."""
        t, width = self.t, self.concurrency()
        mean_s = float(t.sums[SERVICE_S]) * Pace(*map(float, t.sums[PACE : PACE + 5])).when_full()
        seen = int(t.counts[NEXT])
        arrivals = seen - int(np.searchsorted(t.arrive, self.now - _RATE_WINDOW_S, side="right"))
        waiting = t.head[t.head >= 0]
        return LoadSnapshot(
            queued=self.queued,
            running=self.running,
            queued_work_s=self.queued * mean_s / width,
            running_work_s=self.running * mean_s / width,
            arrival_rate_rps=arrivals / min(_RATE_WINDOW_S, max(self.now, 1.0)),
            work_per_request_s=mean_s / width,
            oldest_age_s=max(self.now - float(t.arrive[waiting].min()), 0.0) if waiting.size else 0.0,
            replica_concurrency=width,
            start_up_s=self.model.start_up_s,
            late_share=self._late_share(),
        )

    def recent(self, seconds: float) -> Any:
        """Numbers of the requests that arrived in the last `seconds`."""
        since = int(np.searchsorted(self.t.arrive, self.now - seconds, side="right"))
        return np.arange(since, int(self.t.counts[NEXT]))

    def _late_share(self) -> float:
        served, late = int(self.t.counts[SERVED]), int(self.t.counts[LATE])
        self._burn.add(served - self._counted[0], late - self._counted[1], self.now)
        self._counted = (served, late)
        return self._burn.share()
