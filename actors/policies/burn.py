"""How much of an SLO's error budget is being used: the share of late requests of the last minute.

Pure. The queue and the simulator count into it; `actors.policies.autoscaling` raises or lowers its headroom by it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_MEMORY_S = 60.0  # time constant


@dataclass(slots=True)
class Burn:
    """Requests that ended and those of them that were late, both forgotten alike."""

    ended: float = 0.0
    late: float = 0.0
    at: float = 0.0

    def add(self, ended: float, late: float, now: float) -> None:
        """So many ended, `late` of them outside an SLO."""
        kept = math.exp(-max(now - self.at, 0.0) / _MEMORY_S)
        self.ended, self.late, self.at = self.ended * kept + ended, self.late * kept + late, now

    def share(self) -> float:
        """Share of late ones, 0 to 1; 0 before any."""
        return self.late / self.ended if self.ended > 0.0 else 0.0
