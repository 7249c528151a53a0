"""Other people's scaling laws, from their sources, to be compared on the same pool.

Each sees what it sees at home: Ray ongoing requests, Knative concurrency, llm-d latencies.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np

from app.simulate.pool import Pool


class _Window:
    """Samples of the last seconds."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._samples: deque[tuple[float, float]] = deque()

    def add(self, now: float, value: float) -> None:
        self._samples.append((now, value))
        while self._samples[0][0] <= now - self._seconds:
            self._samples.popleft()

    def mean(self) -> float:
        return math.fsum(v for _, v in self._samples) / len(self._samples)

    def least(self) -> float:
        return min(v for _, v in self._samples)

    def most(self) -> float:
        return max(v for _, v in self._samples)


@dataclass(frozen=True, kw_only=True)
class RaySettings:
    """Ray Serve's `AutoscalingConfig`, its defaults (2.60)."""

    target_ongoing_requests: float = 2.0
    look_back_period_s: float = 30.0
    metrics_interval_s: float = 10.0
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0


class Ray:
    """ray/serve/autoscaling_policy.py: ongoing requests over the target, held back by delays.

    Args:
        name: of the policy.
        settings: of the deployment.
    """

    every_s = 1.0

    def __init__(self, name: str, settings: RaySettings) -> None:
        self.name = name
        self._settings = settings
        self._ongoing = _Window(settings.look_back_period_s)
        self._sampled_at = -math.inf
        self._wanted_since: tuple[int, float] = (0, 0.0)  # direction, since when

    def decide(self, pool: Pool) -> int:
        """The target, unless another one was wanted for the whole delay."""
        s, now = self._settings, pool.now
        if now - self._sampled_at >= s.metrics_interval_s:
            self._ongoing.add(now, pool.running + pool.queued)
            self._sampled_at = now
        desired = math.ceil(self._ongoing.mean() / s.target_ongoing_requests)
        direction = (desired > pool.target) - (desired < pool.target)
        if direction != self._wanted_since[0]:
            self._wanted_since = (direction, now)
        delay_s = s.upscale_delay_s if direction > 0 else s.downscale_delay_s
        if direction and now - self._wanted_since[1] >= delay_s:
            self._wanted_since = (0, now)
            return desired
        return pool.target


class Knative:
    """Knative's KPA (pkg/autoscaler/scaling/autoscaler.go) with its defaults: 60 s stable, 6 s panic, 70 %, 200 %.

    Args:
        target_utilization: share of c* that a replica should run.
    """

    name = "knative"
    every_s = 2.0

    def __init__(self, target_utilization: float = 0.7) -> None:
        self._utilization = target_utilization
        self._stable, self._panic = _Window(60.0), _Window(6.0)
        self._panics_since: float | None = None
        self._panic_most = 0

    def decide(self, pool: Pool) -> int:
        """Observed concurrency over the target's; in panic the short window, and never down."""
        now, ready = pool.now, max(pool.ready, 1)
        concurrency = pool.running + pool.queued
        for window in (self._stable, self._panic):
            window.add(now, concurrency)
        target = self._utilization * pool.concurrency()
        most_up, most_down = 1000.0 * ready, math.floor(ready / 2.0)
        stable = min(max(math.ceil(self._stable.mean() / target), most_down), most_up)
        panic = min(max(math.ceil(self._panic.mean() / target), most_down), most_up)
        if panic / ready >= 2.0:
            self._panics_since = now
        elif self._panics_since is not None and now - self._panics_since > 60.0:
            self._panics_since, self._panic_most = None, 0
        if self._panics_since is None:
            return int(stable)
        self._panic_most = int(max(self._panic_most, panic, stable, ready))
        return self._panic_most


class LlmD:
    """llm-d's SLO-aware law (guides/workload-autoscaling/slo-aware): P90 latency over its SLO, through an HPA.

    Recording rules every 15 s; s = mean over 45 s of min(max(TTFT P90 / SLO, TPOT P90 / SLO), 2), P90 over one
    minute; up at s > 0.55, down at s < 0.40, discounted by what already starts; up by max(100 %, 4) a minute
    after 30 s, down by one in 120 s after 180 s. TTFT is its predictor's: what a request must expect when it comes.
    """

    name = "llm-d"
    every_s = 15.0

    def __init__(self, up: float = 0.55, down: float = 0.40) -> None:
        self._up, self._down = up, down
        self._signal = _Window(45.0)
        self._asked_up, self._asked_down = _Window(30.0), _Window(180.0)
        self._added: deque[tuple[float, int]] = deque()
        self._removed_at = -math.inf

    def decide(self, pool: Pool) -> int:
        """The HPA's target."""
        now, n = pool.now, pool.target
        self._signal.add(now, min(_worst_of_slo(pool), 2.0))
        asked = self._asked(self._signal.mean(), n, pool.ready)
        self._asked_up.add(now, asked)
        self._asked_down.add(now, asked)
        if (up := int(self._asked_up.least())) > n:
            while self._added and now - self._added[0][0] >= 60.0:
                self._added.popleft()
            before = n - sum(more for _, more in self._added)
            up = min(up, before + max(before, 4))
            self._added.append((now, max(up - n, 0)))
            return max(up, n)
        if int(self._asked_down.most()) < n and now - self._removed_at >= 120.0:
            self._removed_at = now
            return n - 1
        return n

    def _asked(self, signal: float, n: int, ready: int) -> int:
        credit = ready / n if 0 < ready < n else 1.0
        if signal > self._up:
            return n + math.ceil(n * (signal * credit / self._up - 1.0))
        if signal < self._down:
            return n - math.floor(n * (1.0 - signal / self._down))
        return n


def _worst_of_slo(pool: Pool) -> float:
    """P90 of expected TTFT and of TPOT over the last minute, each over its SLO; 0 without traffic."""
    t, minute = pool.t, pool.recent(60.0)
    if not minute.size:
        return 0.0
    wait = np.where(
        np.isnan(t.first[minute]), pool.now - t.arrive[minute], t.first[minute] - t.arrive[minute]
    )
    ended = pool.recent(600.0)
    ended = ended[(t.done[ended] > pool.now - 60.0) & (t.output[ended] > 1)]
    tpot = (t.done[ended] - t.first[ended]) / (t.output[ended] - 1)
    ttft_p90 = float(np.quantile(wait, 0.9))
    tpot_p90 = float(np.quantile(tpot, 0.9)) if ended.size else 0.0
    return max(ttft_p90 / pool.model.ttft_slo_s, tpot_p90 / pool.model.tpot_slo_s)
