"""The next ticket onto a replica, and others off it: batch for a higher class, a burst for another tenant.

Pure. Called by `actors.policies.dispatch` whenever something has changed; takes the head from the line, credit from
the pool and, if need be, places from those who may give theirs up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from actors.policies.class_line import charge_of
from actors.policies.credit import Held, ReplicaCredit
from actors.policies.decisions import Granted, Preempted
from actors.policies.fairness import WaitingLine
from actors.policies.moving import to_move
from actors.policies.pool import Pool
from actors.policies.preemption import Preemption
from actors.policies.waiting import Waiting
from actors.types import Grant, PriorityClass, Ticket

_TIGHT = 3.0  # service times
_LOOK_AGAIN_S = 0.02  # after a look for somebody to move that found nobody: it goes through all who run


def _is_tight(head: Waiting, now: float) -> bool:
    """Would it miss its deadline if it were sent away once?"""
    return head.deadline_at - now < _TIGHT * head.work_s / head.ticket.sequences


@dataclass(slots=True)
class Placement:
    """Joins a line and a pool."""

    line: WaitingLine
    pool: Pool
    preemption: Preemption = field(default_factory=Preemption)
    _ahead: list[tuple[ReplicaCredit, Ticket]] = field(
        default_factory=list
    )  # granted now, to wait in an engine
    _nobody_at: float = -math.inf

    def place(self, head: Waiting, now: float) -> Granted | None:
        """Grant the ticket whose turn it is; None: it fits nowhere."""
        ticket = head.ticket
        priority = ticket.principal.priority
        before_others = self.line.sequences_above(priority) > 0  # it has its turn although those wait
        batch = priority is PriorityClass.BATCH
        # What waits in an engine stands before everyone else: batch before higher classes, a burst before others.
        ahead = self.line.of_class(priority).share_held(ticket.principal.tenant) <= 1.0
        if batch:
            ahead = before_others or self.preemption.quiet(now)
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
            charged=ticket.predicted_output_tokens * ticket.sequences,
            stays=before_others or _is_tight(head, now) or self.preemption.stays(ticket),
            first_token=self.preemption.fruitless(ticket),
        )
        self.line.serve(head)
        self.pool.take(replica, held)
        held.ahead = replica.free_sequences() < 0
        if held.ahead and not batch:
            self.preemption.pressed(now)
            self._ahead.append((replica, ticket))
        return Granted(gateway_id=head.gateway_id, grant=grant)

    def make_room(self, blocked: Ticket | None, now: float) -> list[Preempted]:
        """Take places for those who found none: from batch for higher classes, from a burst for other tenants.

        Args:
            blocked: the head of the line, which fits nowhere; None: nobody waits.
            now: the time.
        """
        leaving: list[Held] = []
        waiting = self.line.sequences_above(PriorityClass.BATCH)
        if waiting:
            self.preemption.pressed(now)
        if self.pool.settings.preempt_batch and self.pool.yielding_sequences():
            for replica, held in self.preemption.victims(
                self.pool.usable(now), blocked if waiting else None, waiting
            ):
                replica.send_away(held, now)
                leaving.append(held)
        if self.pool.settings.preempt_tenants:
            leaving += self._for_other_tenants(blocked if waiting else None, now)
        self._ahead.clear()
        return [Preempted(gateway_id=h.gateway_id, request_id=h.ticket.request_id) for h in leaving]

    def _for_other_tenants(self, blocked: Ticket | None, now: float) -> list[Held]:
        leaving: list[Held] = []

        def move(replicas: list[ReplicaCredit], ticket: Ticket, *, charged: bool) -> bool:
            line = self.line.of_class(ticket.principal.priority)
            tenant = ticket.principal.tenant
            due = 0.0 if charged else charge_of(ticket) / line.counters.weight(tenant)
            found = to_move(replicas, line, ticket, line.counters.counter(tenant) + due)
            if found is not None:
                replica, held = found
                replica.send_away(held, now)
                leaving.append(held)
            return found is not None

        for replica, ticket in self._ahead:
            if replica.free_sequences() < 0:
                move([replica], ticket, charged=True)
        if blocked is not None and now - self._nobody_at > _LOOK_AGAIN_S:
            line, tenant = self.line.of_class(blocked.principal.priority), blocked.principal.tenant
            if not line.others_hold(tenant):
                return leaving  # the usual case: nobody has to be looked for among all who run
            wanted = line.waiting(tenant)
            replicas = self.pool.usable(now)
            if sum(r.leaving_sequences for r in replicas) < wanted and not move(
                replicas, blocked, charged=False
            ):
                self._nobody_at = now
        return leaving
