"""The waiting line of one class: tenants by virtual token counter, within a tenant the earliest deadline.

Pure. Called by `actors.policies.fairness`, which puts the classes together. Costs are O(log n) per ticket.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from actors.policies.virtual_counters import VirtualCounters
from actors.policies.waiting import TicketHeap, Waiting
from actors.types import Ticket

# What a token costs (VTC's cost function): an output token takes an engine step, input tokens share one.
INPUT_WEIGHT = 1.0
OUTPUT_WEIGHT = 2.0


@dataclass(slots=True)
class _TenantLine:
    tickets: TicketHeap = field(default_factory=TicketHeap)
    work_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Promised:
    """Work that refused callers were told to come back with, in slot-seconds."""

    before_s: float = 0.0  # in higher classes
    class_s: float = 0.0  # in the class
    tenant_s: float = 0.0  # of the tenant in the class


class ClassLine:
    """Tickets of one class.

    The service of two tenants that both wait all the time differs, over any interval and each divided by its
    weight, by at most 2·max(w_p·L, w_q·M)/min(weights): w_p and w_q are the two weights above, L the longest prompt,
    M the most tokens (prompt and output) that granted tickets of the class hold together. Output that replicas have
    produced and not reported yet belongs to such tickets, so late reports are within M.

    Args:
        tenant_weights: share of each tenant; 1 for those not named.
    """

    def __init__(self, tenant_weights: Mapping[str, float]) -> None:
        self.counters = VirtualCounters(tenant_weights)
        self._tenants: dict[str, _TenantLine] = {}
        self._arrivals = TicketHeap()
        self._weight = 0.0  # of the tenants that wait
        self.work_s = 0.0  # slot-seconds in line
        self.sequences = 0

    def __len__(self) -> int:
        return self._arrivals.live

    def join(self, waiting: Waiting, sequence: int) -> None:
        """Put a ticket in its tenant's line."""
        name = waiting.ticket.principal.tenant
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._tenants[name] = _TenantLine()
            self.counters.join(name)
            self._weight += self.counters.weight(name)
        tenant.tickets.push(waiting.key(), sequence, waiting)
        tenant.work_s += waiting.work_s
        self._arrivals.push((True, waiting.arrived_at), sequence, waiting)
        self.work_s += waiting.work_s
        self.sequences += waiting.ticket.sequences

    def leave(self, waiting: Waiting) -> None:
        """Take a ticket out, wherever it stands."""
        waiting.left = True
        name = waiting.ticket.principal.tenant
        tenant = self._tenants[name]
        tenant.tickets.dropped()
        tenant.work_s -= waiting.work_s
        self._arrivals.dropped()
        self.sequences -= waiting.ticket.sequences
        self.work_s -= waiting.work_s
        if not tenant.tickets.live:
            del self._tenants[name]
            self.counters.leave(name)
            self._weight -= self.counters.weight(name)
        if not self._tenants:
            self.work_s = self._weight = 0.0  # float sums drift

    def head(self) -> Waiting | None:
        """The ticket whose turn it is."""
        name = self.counters.next()
        return self._tenants[name].tickets.first() if name is not None else None

    def oldest(self) -> Waiting | None:
        """The ticket that came first."""
        return self._arrivals.first()

    def charge_input(self, ticket: Ticket) -> None:
        """Its prompt is about to be read; also when that happens again after a fault: it is work once more."""
        self.counters.charge(ticket.principal.tenant, INPUT_WEIGHT * ticket.prompt_tokens)

    def charge_output(self, ticket: Ticket, tokens: int) -> None:
        """Tokens were produced for it."""
        self.counters.charge(ticket.principal.tenant, OUTPUT_WEIGHT * tokens)

    def work_ahead_s(self, ticket: Ticket, work_s: float, promised: Promised) -> float:
        """Slot-seconds of this class that a new ticket waits for, itself `work_s` of work.

        All that waits, or less for a light tenant: by the time its own work in line and this ticket have had their
        turn, each of the others has had as much, by weight.
        """
        name = ticket.principal.tenant
        tenant = self._tenants.get(name)
        own_weight = self.counters.weight(name)
        own_s = (max(tenant.work_s, 0.0) if tenant is not None else 0.0) + promised.tenant_s
        others_weight = max(self._weight - (own_weight if tenant is not None else 0.0), 0.0)
        fair_share_s = own_s + (own_s + work_s) * others_weight / own_weight
        return min(max(self.work_s, 0.0) + promised.class_s, fair_share_s)
