"""The waiting line of one model: in which order tickets get their turn.

Pure. Called by `actors.policies.dispatch`. Classes in order with a small share for the lower ones
(`class_shares`), within a class tenants by virtual token counter, within a tenant the earliest deadline
(`class_line`). Where a ticket runs and whether it is admitted at all is decided in the dispatcher.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from actors.policies.class_line import ClassLine, Promised
from actors.policies.class_shares import ClassShares
from actors.policies.credit import ticket_tokens
from actors.policies.waiting import Waiting
from actors.types import PriorityClass, Ticket

_CLASSES = tuple(PriorityClass)


class WaitingLine:
    """Tickets in the order of their turns, with the work they stand for.

    Args:
        class_weights: see `ClassShares`.
        tenant_weights: see `ClassLine`.
    """

    def __init__(
        self,
        class_weights: Mapping[PriorityClass, float] | None = None,
        tenant_weights: Mapping[str, float] | None = None,
    ) -> None:
        self._shares = ClassShares(class_weights or {})
        self._classes = {priority: ClassLine(tenant_weights or {}) for priority in _CLASSES}
        self._by_id: dict[str, Waiting] = {}
        self._sequence = itertools.count()  # ties are broken by order of submission

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_id

    def join(self, waiting: Waiting) -> None:
        """Put a ticket in line."""
        self._by_id[waiting.ticket.request_id] = waiting
        self._classes[waiting.ticket.principal.priority].join(waiting, next(self._sequence))

    def leave(self, request_id: str) -> Waiting | None:
        """Take a ticket out of the line, unserved; None if it is not in it."""
        waiting = self._by_id.pop(request_id, None)
        if waiting is None:
            return None
        priority = waiting.ticket.principal.priority
        self._classes[priority].leave(waiting)
        if not self._classes[priority]:
            self._shares.left(priority)
        return waiting

    def head(self) -> Waiting | None:
        """The ticket whose turn it is. While it does not fit anywhere, nobody passes it."""
        priority = self._shares.next(self._waiting_classes(), self._cost_of_head)
        return self._classes[priority].head() if priority is not None else None

    def serve(self, waiting: Waiting) -> None:
        """The ticket has its turn: it leaves, and its tenant and class pay for it."""
        ticket = waiting.ticket
        priority = ticket.principal.priority
        self._shares.served(priority, ticket_tokens(ticket), self._waiting_classes())
        self._classes[priority].served(ticket)
        self.leave(ticket.request_id)

    def charge_output(self, ticket: Ticket, tokens: int) -> None:
        """A ticket that was served produced so many tokens more than it was charged for, or fewer: below 0."""
        if tokens:
            self._classes[ticket.principal.priority].charge_output(ticket, tokens)

    def released(self, ticket: Ticket) -> None:
        """A ticket that was served has left its replica."""
        self._classes[ticket.principal.priority].released(ticket)

    def of_class(self, priority: PriorityClass) -> ClassLine:
        """The line of one class."""
        return self._classes[priority]

    def get(self, request_id: str) -> Waiting | None:
        """A ticket in line."""
        return self._by_id.get(request_id)

    def of_gateway(self, gateway_id: str) -> list[str]:
        """Request ids that one gateway has in line."""
        return [i for i, waiting in self._by_id.items() if waiting.gateway_id == gateway_id]

    def count(self, priority: PriorityClass) -> int:
        """Tickets of one class in line."""
        return len(self._classes[priority])

    def sequences_above(self, priority: PriorityClass) -> int:
        """Sequences that wait in higher classes."""
        return sum(self._classes[above].sequences for above in _CLASSES[: priority.rank])

    def work_s(self, up_to: PriorityClass = PriorityClass.BATCH) -> float:
        """Slot-seconds in line in this class and those before it."""
        return sum(max(self._classes[above].work_s, 0.0) for above in _CLASSES[: up_to.rank + 1])

    def work_ahead_s(self, ticket: Ticket, work_s: float, promised: Promised | None = None) -> float:
        """Slot-seconds that a new ticket, itself `work_s` of work, waits for; see `ClassLine.work_ahead_s`."""
        promised = promised or Promised()
        priority = ticket.principal.priority
        before_s = self.work_s(_CLASSES[priority.rank - 1]) if priority.rank else 0.0
        within_s = self._classes[priority].work_ahead_s(ticket, work_s, promised)
        return before_s + promised.before_s + within_s

    def oldest_age_s(self, now: float, priority: PriorityClass) -> float:
        """Time since first arrival of the class's oldest ticket; 0 when none waits."""
        oldest = self._classes[priority].oldest()
        return now - oldest.arrived_at if oldest is not None else 0.0

    def _waiting_classes(self) -> list[PriorityClass]:
        return [priority for priority, line in self._classes.items() if line]

    def _cost_of_head(self, priority: PriorityClass) -> float:
        head = self._classes[priority].head()
        return ticket_tokens(head.ticket) if head is not None else 0.0
