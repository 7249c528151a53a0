"""The next ticket onto a replica, and batch off it where a higher class finds no place.

Pure. Called by `actors.policies.dispatch` whenever something has changed; takes the head from the line, credit from
the pool and, if need be, places from batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from actors.policies.credit import Held
from actors.policies.decisions import Granted, Preempted
from actors.policies.fairness import WaitingLine
from actors.policies.pool import Pool
from actors.policies.preemption import Preemption
from actors.policies.waiting import Waiting
from actors.types import Grant, PriorityClass, Ticket

_TIGHT = 3.0  # service times


def _is_tight(head: Waiting, now: float) -> bool:
    """Would it miss its deadline if it were sent away once?"""
    return head.deadline_at - now < _TIGHT * head.work_s / head.ticket.sequences


@dataclass(slots=True)
class Placement:
    """Joins a line and a pool."""

    line: WaitingLine
    pool: Pool
    preemption: Preemption = field(default_factory=Preemption)

    def place(self, head: Waiting, now: float) -> Granted | None:
        """Grant the ticket whose turn it is; None: it fits nowhere."""
        ticket = head.ticket
        priority = ticket.principal.priority
        before_others = self.line.sequences_above(priority) > 0  # it has its turn although those wait
        batch = priority is PriorityClass.BATCH
        # Batch that waits in an engine would stand before higher classes.
        ahead = not batch or before_others or self.preemption.quiet(now)
        replica = self.pool.choose(ticket, now, ahead=ahead)
        if replica is None:
            return None
        grant = Grant(
            request_id=ticket.request_id,
            replica_id=replica.replica_id,
            waited_s=now - head.arrived_at,
            attempt=ticket.attempt,
        )
        held = Held(
            ticket=ticket,
            gateway_id=head.gateway_id,
            granted_at=now,
            grant=grant,
            stays=before_others or _is_tight(head, now) or self.preemption.stays(ticket),
            first_token=self.preemption.fruitless(ticket),
        )
        self.line.serve(head)
        self.pool.take(replica, held)
        if not batch and replica.free_sequences() < 0:
            self.preemption.pressed(now)
        return Granted(gateway_id=head.gateway_id, grant=grant)

    def make_room(self, blocked: Ticket | None, now: float) -> list[Preempted]:
        """Take places from batch for the higher classes that found none.

        Args:
            blocked: the head of the line, which fits nowhere; None: nobody waits.
            now: the time.
        """
        waiting = self.line.sequences_above(PriorityClass.BATCH)
        if waiting:
            self.preemption.pressed(now)
        if not (self.pool.settings.preempt_batch and self.pool.yielding_sequences()):
            return []
        victims = self.preemption.victims(self.pool.usable(now), blocked if waiting else None, waiting)
        for replica, held in victims:
            replica.send_away(held, now)
        return [Preempted(gateway_id=h.gateway_id, request_id=h.ticket.request_id) for _, h in victims]
