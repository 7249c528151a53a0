"""How much slower a request is on a full replica than on the one it ran on.

Pure. A batch that grows makes every sequence in it slower, so work that was measured on replicas half empty says
too little about how many full ones it needs. The queue and the simulator feed this with what ended and count work
at the pace of a full replica (`actors.policies.load`).
"""

from __future__ import annotations

from dataclasses import dataclass

_MEMORY = 0.998  # of older observations, with each new one: about 500 count
_LEAST_VARIANCE = 1e-4  # of the load: less says nothing about a slope
_MOST = 4.0  # times slower


@dataclass(slots=True)
class Pace:
    """Seconds per token against load, a line by least squares; each request weighs as much as it has tokens."""

    weight: float = 0.0
    load: float = 0.0  # sums of load, seconds per token, their squares and product, each with its weight
    pace: float = 0.0
    load_load: float = 0.0
    load_pace: float = 0.0

    def observe(self, *, service_s: float, tokens: int, load: float) -> None:
        """Learn from a request that ended.

        Args:
            service_s: how long it held its place.
            tokens: that it produced; of none nothing is learnt.
            load: share of its replica in use as it ended, 0 to 1.
        """
        if tokens <= 0:
            return
        self.weight = _MEMORY * self.weight + tokens
        self.load = _MEMORY * self.load + tokens * load
        self.pace = _MEMORY * self.pace + service_s
        self.load_load = _MEMORY * self.load_load + tokens * load * load
        self.load_pace = _MEMORY * self.load_pace + service_s * load

    def when_full(self) -> float:
        """Service time on a full replica over the mean one, at least 1."""
        if self.weight <= 0.0 or self.pace <= 0.0:
            return 1.0
        load, pace = self.load / self.weight, self.pace / self.weight
        variance = max(self.load_load / self.weight - load * load, 0.0)
        covariance = self.load_pace / self.weight - load * pace
        slope = max(covariance, 0.0) / (variance + _LEAST_VARIANCE)
        return min(max((pace + slope * (1.0 - load)) / pace, 1.0), _MOST)
