"""Scaling policies as the simulator calls them, and ours: the object that runs in Serve's controller."""

from __future__ import annotations

from typing import Protocol

from actors.policies.autoscaling import ScalingConfig, ScalingState, decide
from app.simulate.pool import Pool


class Policy(Protocol):
    """Decides how many replicas a pool should have."""

    name: str
    every_s: float  # between two decisions

    def decide(self, pool: Pool) -> int:
        """The replicas wanted now. Bounds are the simulator's part."""
        ...


class Shoal:
    """`actors.policies.autoscaling.decide` on the pool's snapshots.

    Args:
        config: of the law.
        first_replicas: that it finds.
    """

    name = "shoal"
    every_s = 2.0

    def __init__(self, config: ScalingConfig, first_replicas: int) -> None:
        self._config = config
        self.state = ScalingState.start(first_replicas, 0.0)

    def decide(self, pool: Pool) -> int:
        """What the law says."""
        replicas, self.state = decide(self.state, pool.snapshot(), self._config, pool.now)
        return replicas


class Static:
    """A fixed number."""

    every_s = 60.0

    def __init__(self, replicas: int) -> None:
        self.name = f"static-{replicas}"
        self._replicas = replicas

    def decide(self, pool: Pool) -> int:
        """Always the same."""
        del pool
        return self._replicas


class Schedule:
    """A plan made beforehand: replicas per interval. What is ordered in time is ready in time.

    Args:
        name: of the policy.
        plan: replicas that are to be ready in each interval.
        interval_s: length of one.
        start_up_s: so much earlier they are ordered.
    """

    def __init__(self, name: str, plan: list[int], interval_s: float, start_up_s: float) -> None:
        self.name = name
        self.every_s = min(interval_s, 5.0)
        self._plan = plan
        self._interval_s = interval_s
        self._ahead_s = start_up_s

    def decide(self, pool: Pool) -> int:
        """What is needed at any moment from now until a replica ordered now is ready."""
        last = len(self._plan) - 1
        here = min(int((pool.now + 1e-6) / self._interval_s), last)
        there = min(int((pool.now + self._ahead_s + self.every_s) / self._interval_s), last)
        return max(self._plan[here : there + 1])
