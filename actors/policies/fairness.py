"""The waiting line of one model: in which order tickets get their turn.

Pure. Called by `actors.policies.dispatch`. The order is class, then first arrival; where a ticket runs and
whether it is admitted at all is decided there.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from actors.types import PriorityClass, Ticket

_SPARE_ENTRIES = 64  # of tickets that left; fewer are not worth a sweep


@dataclass(slots=True)
class Waiting:
    """A ticket in line."""

    ticket: Ticket
    gateway_id: str
    arrived_at: float  # first arrival, also of earlier attempts
    deadline_at: float
    work_s: float  # slot-seconds
    left: bool = False  # cancelled, expired or granted; skipped when its turn comes


@dataclass(slots=True)
class WaitingLine:
    """Tickets by class and first arrival, with the work they stand for."""

    _heaps: dict[PriorityClass, list[tuple[float, int, Waiting]]] = field(
        default_factory=lambda: {priority: [] for priority in PriorityClass}
    )
    _by_id: dict[str, Waiting] = field(default_factory=dict)
    _work_s: dict[PriorityClass, float] = field(default_factory=lambda: dict.fromkeys(PriorityClass, 0.0))
    _counts: dict[PriorityClass, int] = field(default_factory=lambda: dict.fromkeys(PriorityClass, 0))
    _sequence: int = 0  # ties are broken by order of submission

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_id

    def join(self, waiting: Waiting) -> None:
        """Put a ticket in line at the place its first arrival gives it."""
        priority = waiting.ticket.principal.priority
        self._sequence += 1
        heapq.heappush(self._heaps[priority], (waiting.arrived_at, self._sequence, waiting))
        self._by_id[waiting.ticket.request_id] = waiting
        self._work_s[priority] += waiting.work_s
        self._counts[priority] += 1

    def leave(self, request_id: str) -> Waiting | None:
        """Take a ticket out of the line; None if it is not in it."""
        waiting = self._by_id.pop(request_id, None)
        if waiting is None:
            return None
        waiting.left = True
        priority = waiting.ticket.principal.priority
        self._counts[priority] -= 1
        # An empty class has no work: float sums drift.
        self._work_s[priority] = self._work_s[priority] - waiting.work_s if self._counts[priority] else 0.0
        self._compact(priority)
        return waiting

    def _compact(self, priority: PriorityClass) -> None:
        """Forget those who left, once they are most of the heap: a blocked class never pops them."""
        heap = self._heaps[priority]
        if len(heap) > _SPARE_ENTRIES + 2 * self._counts[priority]:
            heap[:] = [entry for entry in heap if not entry[2].left]
            heapq.heapify(heap)

    def get(self, request_id: str) -> Waiting | None:
        """A ticket in line."""
        return self._by_id.get(request_id)

    def head(self, priority: PriorityClass) -> Waiting | None:
        """The ticket of this class whose turn it is."""
        heap = self._heaps[priority]
        while heap and heap[0][2].left:
            heapq.heappop(heap)
        return heap[0][2] if heap else None

    def of_gateway(self, gateway_id: str) -> list[str]:
        """Request ids that one gateway has in line."""
        return [i for i, waiting in self._by_id.items() if waiting.gateway_id == gateway_id]

    def count(self, priority: PriorityClass) -> int:
        """Tickets of one class in line."""
        return self._counts[priority]

    def work_s(self, up_to: PriorityClass = PriorityClass.BATCH) -> float:
        """Slot-seconds in line in this class and those before it."""
        return sum(max(work, 0.0) for priority, work in self._work_s.items() if priority.rank <= up_to.rank)

    def oldest_age_s(self, now: float, priority: PriorityClass) -> float:
        """Time since first arrival of the class's oldest ticket; 0 when none waits."""
        head = self.head(priority)
        return now - head.arrived_at if head is not None else 0.0
