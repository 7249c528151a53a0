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


def charge_of(ticket: Ticket) -> float:
    """What a ticket is charged when it is granted."""
    output_tokens = ticket.predicted_output_tokens * ticket.sequences
    return INPUT_WEIGHT * ticket.prompt_tokens + OUTPUT_WEIGHT * output_tokens


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

    A ticket's output is charged when it is granted, as predicted, and put right when it ends: a tenant that has just
    taken many slots has had them. One that joins the line is not lifted all the way, but up to its share of what is
    held now: what others took in a burst just before stands against them.

    The service of two tenants that both wait all the time differs, over any interval, by at most
    (2·w_p·L + 6·w_q·M)/min(weights): w_p and w_q are the two weights above, L the longest prompt, M the most tokens
    (prompt and output, predicted or produced) that granted tickets of the class hold together. Proof: who is granted
    has the lower counter, so it leads by one ticket (w_p·L + w_q·M) at most, and by what the other one is given back
    for predictions (w_q·M); that holds on both sides, and one may begin w_q·M below the other (its credit). What is
    charged and what was produced differ by w_q·M at most, before and after.

    Args:
        tenant_weights: share of each tenant; 1 for those not named.
    """

    def __init__(self, tenant_weights: Mapping[str, float]) -> None:
        self.counters = VirtualCounters(tenant_weights)
        self._tenants: dict[str, _TenantLine] = {}
        self._held: dict[str, float] = {}  # by tenant: what its granted tickets were charged
        self._held_total = 0.0
        self._active_weight = 0.0  # of the tenants that wait or hold
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
            self._weight += self.counters.weight(name)
            if name not in self._held:
                self._active_weight += self.counters.weight(name)
            self.counters.join(name, credit=self._held_total / self._active_weight)
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
            self._forget_if_inactive(name)
        if not self._tenants:
            self.work_s = self._weight = 0.0  # float sums drift

    def head(self) -> Waiting | None:
        """The ticket whose turn it is."""
        name = self.counters.next()
        return self._tenants[name].tickets.first() if name is not None else None

    def waiting(self, tenant: str) -> int:
        """Tickets of a tenant in line."""
        line = self._tenants.get(tenant)
        return line.tickets.live if line is not None else 0

    def oldest(self) -> Waiting | None:
        """The ticket that came first."""
        return self._arrivals.first()

    def served(self, ticket: Ticket) -> None:
        """It is granted: its prompt is about to be read, and its output is on its way.

        Also when that happens again after a fault: it is work once more.
        """
        cost = charge_of(ticket)
        name = ticket.principal.tenant
        self._held[name] = self._held.get(name, 0.0) + cost
        self._held_total += cost
        self.counters.charge(name, cost)

    def charge_output(self, ticket: Ticket, tokens: int) -> None:
        """Tokens were produced beyond what was predicted, or below 0: fewer than that."""
        self.counters.charge(ticket.principal.tenant, OUTPUT_WEIGHT * tokens)

    def released(self, ticket: Ticket) -> None:
        """It holds nothing any more."""
        name = ticket.principal.tenant
        self._held[name] -= charge_of(ticket)
        self._held_total -= charge_of(ticket)
        if self._held[name] < 1.0:  # a ticket is one token at least
            self._held_total -= self._held.pop(name)
            self._forget_if_inactive(name)

    def others_hold(self, tenant: str) -> bool:
        """Does any other tenant hold something?"""
        return len(self._held) > (tenant in self._held)

    def share_held(self, tenant: str) -> float:
        """What it holds over its share, by weight, of what all hold: 1 is just that, also for the only tenant."""
        if not self._held_total:
            return 0.0
        share = self.counters.weight(tenant) / self._active_weight
        return self._held.get(tenant, 0.0) / (share * self._held_total)

    def _forget_if_inactive(self, tenant: str) -> None:
        if tenant not in self._held and tenant not in self._tenants:
            self._active_weight -= self.counters.weight(tenant)
        if not self._held and not self._tenants:
            self._active_weight = self._held_total = 0.0  # float sums drift

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
