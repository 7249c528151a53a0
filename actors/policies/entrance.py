"""Who is let into the line of one model, and what the others are told.

Pure. Called by `actors.policies.dispatch`: joins the estimate of the wait (`admission`) with what refused callers
were promised (`appointments`).
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

from actors.errors import Overloaded
from actors.policies.admission import (
    Capacity,
    Demand,
    ServiceEstimator,
    is_admitted,
    overloaded,
    predicted_wait_s,
    retry_after_s,
)
from actors.policies.appointments import Appointments
from actors.policies.class_line import Promised
from actors.policies.fairness import WaitingLine
from actors.policies.pool import Pool
from actors.types import Ticket


@dataclass(slots=True)
class Entrance:
    """Admission by predicted wait.

    Args:
        rng: source of the Retry-After jitter.
    """

    line: WaitingLine
    pool: Pool
    rng: random.Random
    estimator: ServiceEstimator = field(default_factory=ServiceEstimator)
    appointments: Appointments = field(default_factory=Appointments)
    demand: Demand = field(default_factory=Demand)

    def refusal(self, ticket: Ticket, now: float) -> Overloaded | None:
        """Why a ticket is refused at once; None: it is let in.

        One that was let in before and comes back after a fault has its place, whatever is predicted now.
        """
        if ticket.returning:
            return None
        if ticket.avoid:
            return self._second_start(ticket, now)
        allowed_s = ticket.timeout_s - self.estimator.service_s(ticket)
        came_as_told = self.appointments.keep(ticket, now)
        priority = ticket.principal.priority
        capacity = self.pool.capacity(priority)
        capacity = replace(capacity, share=self.demand.share_below(priority, capacity.slots, now))
        predicted_s = self._wait_s(ticket, capacity)
        promised_s = self._wait_s(ticket, capacity, self.appointments.promised(ticket, now))
        full = len(self.line) >= self.pool.settings.max_waiting
        if not full and is_admitted(
            predicted_s=predicted_s, promised_s=promised_s, allowed_s=allowed_s, promised=came_as_told
        ):
            self.demand.add(priority, self.estimator.work_s(ticket), now)
            return None
        wait_s = retry_after_s(predicted_s=promised_s, allowed_s=allowed_s, jitter=self.rng.random())
        if allowed_s > 0.0:  # else it needs an idle pool, which nobody can promise
            work_s = self.estimator.work_s(ticket)
            self.appointments.book(ticket, work_s=work_s, wait_s=wait_s, now=now)
        return overloaded(ticket, predicted_s=predicted_s, wait_s=wait_s)

    def _second_start(self, ticket: Ticket, now: float) -> Overloaded | None:
        """Now or never: a second start takes what is idle elsewhere, and stands in nobody's way."""
        if not self.line and self.pool.choose(ticket, now, ahead=False) is not None:
            return None
        return overloaded(ticket, predicted_s=self.estimator.mean_service_s, wait_s=1.0)

    def _wait_s(self, ticket: Ticket, capacity: Capacity, promised: Promised | None = None) -> float:
        return predicted_wait_s(
            work_ahead_s=self.line.work_ahead_s(ticket, self.estimator.work_s(ticket), promised),
            capacity=capacity,
            estimator=self.estimator,
        )
