"""What demand usually grows by while a replica starts, learnt from the load itself.

Pure. A part of `actors.policies.autoscaling`, which keeps spare replicas for it: a load that has come in steps, or
in swells, will come so again before a new replica is ready. Samples are taken over the start-up time, so a slow
start sees more growth, and a single jump in half an hour is not usual.
"""

from __future__ import annotations

from dataclasses import dataclass

_PER_HORIZON = 8.0  # samples in a start-up time
_LEAST_SAMPLE_S = 5.0  # apart
_SAMPLES = 240  # that are remembered: half an hour of a start-up time of a minute
_LEAST_SAMPLES = 28  # fewer say nothing
_SHARE = 0.9  # of the samples, those that the usual growth is not below


@dataclass(frozen=True, kw_only=True, slots=True)
class Growth:
    """The growth of a level over a horizon, sampled."""

    levels: tuple[tuple[float, float], ...] = ()  # (when, level) over the last horizon
    samples: tuple[float, ...] = ()  # growth, the newest last

    def after(self, level: float, now: float, horizon_s: float) -> Growth:
        """What is known with one more level.

        Args:
            level: now.
            now: seconds; a step back begins anew with what has not been undone.
            horizon_s: over which growth is taken: the start-up time, less what may wait; none: nothing is learnt.
        """
        if horizon_s <= 0.0:
            return self
        every_s = max(horizon_s / _PER_HORIZON, _LEAST_SAMPLE_S)
        if self.levels and 0.0 <= now - self.levels[-1][0] < every_s:
            return self
        levels = (*(one for one in self.levels if one[0] <= now), (now, level))
        if len(levels) < 2 or now - levels[0][0] < horizon_s:
            return Growth(levels=levels, samples=self.samples)
        while len(levels) > 2 and now - levels[1][0] >= horizon_s:
            levels = levels[1:]
        return Growth(levels=levels, samples=(*self.samples, level - levels[0][1])[-_SAMPLES:])

    def usual(self) -> float:
        """The 90th percentile of the samples, at least 0; 0 while there are too few."""
        if len(self.samples) < _LEAST_SAMPLES:
            return 0.0
        return max(sorted(self.samples)[int(_SHARE * len(self.samples))], 0.0)
