"""Ids that are marked for a while: banned, draining, ended a moment ago.

Pure. Used by `actors.policies.dispatch`; what a mark means is decided there.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Marks:
    """Marks that all last equally long, so they expire in the order in which they were set."""

    for_s: float
    _until: dict[str, float] = field(default_factory=dict)

    def add(self, key: str, now: float) -> None:
        """Mark an id from now on; forgets those whose mark has expired, so memory is rate times `for_s`."""
        self._until.pop(key, None)
        self._until[key] = now + self.for_s
        for oldest in self._expired(now):
            del self._until[oldest]

    def has(self, key: str, now: float) -> bool:
        """Is the id marked?"""
        return now < self._until.get(key, now)

    def _expired(self, now: float) -> list[str]:
        expired = []
        for key, until in self._until.items():
            if until > now:
                break
            expired.append(key)
        return expired
