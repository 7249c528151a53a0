"""Admission by predicted wait: how much work a ticket is, how long it would wait, when to come back.

Pure. Called by `actors.policies.dispatch`. The unit of work is the slot-second: one engine sequence busy for
one second. How replicas are scaled to the work is `actors.policies.autoscaling`'s question.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from actors.errors import Overloaded
from actors.types import PriorityClass, Ticket

_SMOOTHING = 0.1  # weight of the newest observation in the moving averages
_RELATIVE_BOUNDS = (0.25, 4.0)  # a ticket counts at least a quarter and at most four times the mean
_MIN_RETRY_AFTER_S = 1.0
_JITTER = 0.25  # refused callers spread over up to a quarter more, so they do not return as one
_MOST_JITTER_S = 2.0  # their times are spread already
# Of the wait a deadline allows: let in to the brim, every second one would miss it by a little, its work for nothing.
_ROOM = 0.8
_FULL = 0.9  # of that, the share that is given away in advance
_HALF = 0.5


@dataclass(slots=True)
class ServiceEstimator:
    """Moving averages of how long requests hold their slots.

    A ticket's work is the mean service time, scaled by its predicted output against the mean prediction.
    """

    mean_service_s: float = 1.0  # prior until something was observed
    mean_output_tokens: float = 64.0
    observed: int = 0

    def observe(self, *, service_s: float, predicted_output_tokens: int) -> None:
        """Learn from one request that ran to its end."""
        weight = max(_SMOOTHING, 1.0 / (self.observed + 1))  # the first observations replace the prior
        self.mean_service_s += weight * (service_s - self.mean_service_s)
        self.mean_output_tokens += weight * (max(predicted_output_tokens, 1) - self.mean_output_tokens)
        self.observed += 1

    def service_s(self, ticket: Ticket) -> float:
        """Expected seconds that the ticket holds its slots."""
        low, high = _RELATIVE_BOUNDS
        relative = max(ticket.predicted_output_tokens, 1) / max(self.mean_output_tokens, 1.0)
        return self.mean_service_s * min(max(relative, low), high)

    def work_s(self, ticket: Ticket) -> float:
        """Expected slot-seconds of the ticket: service time times sequences."""
        return self.service_s(ticket) * ticket.sequences


@dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """What the pool can run at the moment of the decision."""

    slots: int  # sequences over all live replicas
    free_slots: int
    start_up_s: float  # measured start-up time of one replica
    slots_per_replica: int  # what one replica adds; used while none is ready
    share: float = 1.0  # of the slots, what higher classes leave to the ticket's own


def predicted_wait_s(*, work_ahead_s: float, capacity: Capacity, estimator: ServiceEstimator) -> float:
    """Expected wait of a ticket that has `work_ahead_s` slot-seconds before it in line.

    With all slots busy, the first of them frees after about mean/slots, and the work ahead drains at one
    slot-second per slot and second, less what higher classes will take (Cobham, 1954: a wait behind classes that
    keep a share r of the servers busy is longer by 1/(1-r)). With no replica at all, one start-up comes first.
    """
    if capacity.slots == 0:
        return capacity.start_up_s + work_ahead_s / (max(capacity.slots_per_replica, 1) * capacity.share)
    if capacity.free_slots > 0 and work_ahead_s == 0.0:
        return 0.0
    first_free_s = 0.0 if capacity.free_slots > 0 else estimator.mean_service_s / capacity.slots
    return (first_free_s + work_ahead_s / capacity.slots) / capacity.share


def retry_after_s(*, predicted_s: float, allowed_s: float, jitter: float) -> float:
    """When a refused caller will be admitted: the excess wait, drained, with a margin for what was estimated.

    Args:
        predicted_s: the wait that was predicted, with what others were promised.
        allowed_s: the wait the deadline leaves.
        jitter: uniform in [0, 1).
    """
    excess_s = max(predicted_s - _FULL * _ROOM * max(allowed_s, 0.0), _MIN_RETRY_AFTER_S)
    return excess_s + jitter * min(_JITTER * excess_s, _MOST_JITTER_S)


def is_admitted(*, predicted_s: float, promised_s: float, allowed_s: float, promised: bool) -> bool:
    """Is a new ticket let in?

    What others were promised keeps newcomers out only while the line is at least half as long as it may be: nobody
    waits for callers who do not come.

    Args:
        predicted_s: its wait behind what is in line.
        promised_s: its wait behind that and what others were promised.
        allowed_s: the wait its deadline leaves.
        promised: it was told to come now.
    """
    if predicted_s == 0.0:
        return True
    room_s = _ROOM * allowed_s
    if predicted_s > room_s:
        return False
    return promised or promised_s <= room_s or predicted_s <= _HALF * room_s


def overloaded(ticket: Ticket, *, predicted_s: float, wait_s: float) -> Overloaded:
    """The answer to a ticket that is not let in.

    Args:
        ticket: the ticket.
        predicted_s: its predicted wait.
        wait_s: when to come back.
    """
    return Overloaded(
        f"overloaded: the predicted wait is {predicted_s:.1f} s and the request's deadline "
        f"{ticket.timeout_s:.1f} s away; retry in {wait_s:.0f} s",
        retry_after_s=wait_s,
    )


_RATE_S = 60.0  # time constant of what a class brings: a burst, which is in line itself, is no rate
_LEAST_SHARE = 0.2


@dataclass(slots=True)
class Demand:
    """What each class brings: slot-seconds of admitted work per second, a moving average."""

    _rates: dict[PriorityClass, float] = field(default_factory=lambda: dict.fromkeys(PriorityClass, 0.0))
    _at: float = 0.0

    def add(self, priority: PriorityClass, work_s: float, now: float) -> None:
        """A ticket of so much work was let in."""
        self._decay(now)
        self._rates[priority] += work_s / _RATE_S

    def share_below(self, priority: PriorityClass, slots: int, now: float) -> float:
        """Of `slots`, the share that the classes above this one leave to it."""
        self._decay(now)
        above = math.fsum(rate for other, rate in self._rates.items() if other.rank < priority.rank)
        return max(1.0 - above / max(slots, 1), _LEAST_SHARE)

    def _decay(self, now: float) -> None:
        kept = math.exp(-max(now - self._at, 0.0) / _RATE_S)
        self._at = now
        for priority in self._rates:
            self._rates[priority] *= kept
