"""A quantile of a stream of positive numbers, in two floats.

Pure. Used by `actors.policies.prediction`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_LEAST_STEP = 0.05  # of the logarithm: 5 % up or down for ever, so it follows a change
_FIRST_STEP = 1.0


@dataclass(slots=True)
class Quantile:
    """Stochastic approximation (Robbins and Monro, 1951) of a quantile, in the logarithm.

    Each value above the estimate raises it by `share` of a step, each other lowers it by the rest of one: it stands
    still where `share` of the values are below. Steps in the logarithm make it indifferent to the unit and keep it
    positive.
    """

    share: float  # 0.9: the 90th percentile
    value: float = 0.0  # the first observation replaces it
    observed: int = 0

    def observe(self, value: float) -> None:
        """Learn from one value, > 0."""
        if self.observed == 0:
            self.value = value
        else:
            step = max(_LEAST_STEP, _FIRST_STEP / self.observed)
            self.value *= math.exp(step * (self.share if value > self.value else self.share - 1.0))
        self.observed += 1
