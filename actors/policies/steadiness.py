"""Who has been well without a break for long enough; pure, asked by `actors.ready_gate`."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field


@dataclass(kw_only=True)
class Steadiness:
    """Remembers since when each name has been well."""

    hold_s: float  # without a break
    _since_s: dict[str, float] = field(default_factory=dict)

    def saw(self, well: AbstractSet[str], now: float) -> None:
        """Take one round of looks: whoever is not among `well` begins anew.

        Args:
            well: the names that were found well.
            now: monotonic seconds.
        """
        self._since_s = {name: self._since_s.get(name, now) for name in well}

    def steady(self, now: float) -> set[str]:
        """The names that have been well for `hold_s` at `now`."""
        return {name for name, since_s in self._since_s.items() if now - since_s >= self.hold_s}
