"""A ticket in line, and a heap of them from which any may leave.

Pure values and one structure of `actors.policies.class_line`.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from actors.types import Ticket

HORIZON_S = (
    30.0  # a later ticket passes an earlier one of its tenant only if it came within this time after it
)
_SPARE_ENTRIES = 64  # of tickets that left; fewer are not worth a sweep

Key = tuple[bool, float]


@dataclass(slots=True)
class Waiting:
    """A ticket in line."""

    ticket: Ticket
    gateway_id: str
    arrived_at: float  # first arrival, also of earlier attempts
    deadline_at: float
    work_s: float  # slot-seconds
    left: bool = False  # cancelled, expired or granted; skipped when its turn comes

    def key(self) -> Key:
        """Place among its tenant's tickets: what a fault brings back, then the earliest deadline, aged.

        A deadline further away than the horizon counts as one there. So a ticket's key is at most its arrival plus
        the horizon, and that of whoever comes later than this is behind it.
        """
        return not self.ticket.returning, min(self.deadline_at, self.arrived_at + HORIZON_S)


@dataclass(slots=True)
class TicketHeap:
    """Tickets by key; those who left are skipped when they come to the top."""

    live: int = 0
    _entries: list[tuple[Key, int, Waiting]] = field(default_factory=list)

    def push(self, key: Key, sequence: int, waiting: Waiting) -> None:
        """Put a ticket in; ties go by `sequence`."""
        heapq.heappush(self._entries, (key, sequence, waiting))
        self.live += 1

    def dropped(self) -> None:
        """One of its tickets has been marked as `left`."""
        self.live -= 1
        # A heap whose first is blocked never pops the others.
        if len(self._entries) > _SPARE_ENTRIES + 2 * self.live:
            self._entries = [entry for entry in self._entries if not entry[2].left]
            heapq.heapify(self._entries)

    def first(self) -> Waiting | None:
        """The ticket with the least key."""
        while self._entries and self._entries[0][2].left:
            heapq.heappop(self._entries)
        return self._entries[0][2] if self._entries else None
