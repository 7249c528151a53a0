"""What becomes of an engine that died: restarted with back-off, with a smaller batch, or quarantined; pure.

Asked by `actors.engines.gpu_share`. The first death in ten minutes restarts the engine as it was. The second halves
the sequences in its batch: running out of memory grows with them. The third ends it: it would only die again, and
take other models' memory with it each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WINDOW_S = 600.0
_FIRST_BACKOFF_S = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Restart:
    """Start it again."""

    after_s: float
    batch_share: float  # of the sequences that it was configured for


@dataclass(frozen=True, kw_only=True, slots=True)
class Quarantine:
    """Leave it dead until somebody looks."""


def after_death(deaths: Sequence[float], now: float) -> Restart | Quarantine:
    """Decide after an engine's death.

    Args:
        deaths: monotonic seconds of all its deaths, this one included.
        now: monotonic seconds.
    """
    recent = sum(now - death <= WINDOW_S for death in deaths)
    if recent >= 3:
        return Quarantine()
    return Restart(after_s=_FIRST_BACKOFF_S * 2 ** (recent - 1), batch_share=0.5 if recent == 2 else 1.0)
