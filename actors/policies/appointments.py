"""When refused callers were told to come back, so that there is room for them when they do.

Pure. Called by `actors.policies.dispatch`. Without it, everyone who is refused within a second is told the same
time, and whoever comes first then takes the place of those who obeyed. Here each refusal reserves the work it
promised: it counts as ahead of newcomers and of later promises, weighted by how many of those who were promised a
time lately did come. A returning caller is known by its tenant, class and prompt; nobody has to send anything.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field

from actors.policies.class_line import Promised
from actors.types import PriorityClass, Ticket

_EARLY_S = 1.0  # clients round what they are told
_GRACE = (2.0, 0.1)  # how late one may come: seconds, and a share of the wait
_SMOOTHING = 0.03  # weight of the newest outcome in the share of those who come
_SPACING = 1.1  # work is booked with a margin: what comes at random needs more room than its mean
_MOST = 50_000  # appointments; more refusals than this are given a time and no place


@dataclass(slots=True)
class _Appointment:
    key: Hashable
    priority: PriorityClass
    tenant: str
    work_s: float
    from_s: float  # on the queue's clock
    open: bool = True


@dataclass(slots=True)
class Appointments:
    """Work promised to refused callers who have not come back yet."""

    show_share: float = 1.0  # of those who were told a time, how many came
    _by_key: dict[Hashable, deque[_Appointment]] = field(default_factory=dict)
    _expiry: list[tuple[float, int, _Appointment]] = field(default_factory=list)
    _class_s: dict[PriorityClass, float] = field(default_factory=lambda: dict.fromkeys(PriorityClass, 0.0))
    _tenant_s: dict[tuple[PriorityClass, str], float] = field(default_factory=dict)
    _sequence: itertools.count[int] = field(default_factory=itertools.count)

    def book(self, ticket: Ticket, *, work_s: float, wait_s: float, now: float) -> None:
        """A refused caller was told to come back in `wait_s`."""
        if len(self._expiry) >= _MOST:
            return
        principal = ticket.principal
        made = _Appointment(
            _key(ticket), principal.priority, principal.tenant, work_s, now + wait_s - _EARLY_S
        )
        self._by_key.setdefault(made.key, deque()).append(made)
        expires_at = now + wait_s + _GRACE[0] + _GRACE[1] * wait_s
        heapq.heappush(self._expiry, (expires_at, next(self._sequence), made))
        self._add(made, made.work_s)

    def keep(self, ticket: Ticket, now: float) -> bool:
        """Has the caller come at a time it was told? Its promise is taken off the books then."""
        self._expire(now)
        mine = self._by_key.get(_key(ticket))
        if mine is None or mine[0].from_s > now:
            return False
        self._close(mine[0])
        self.show_share += _SMOOTHING * (1.0 - self.show_share)
        return True

    def promised(self, ticket: Ticket, now: float) -> Promised:
        """Slot-seconds that are likely to come back, as a new ticket of this caller sees them."""
        self._expire(now)
        priority, tenant = ticket.principal.priority, ticket.principal.tenant
        before_s = sum(work_s for other, work_s in self._class_s.items() if other.rank < priority.rank)
        return Promised(
            before_s=self.show_share * max(before_s, 0.0),
            class_s=self.show_share * max(self._class_s[priority], 0.0),
            tenant_s=self.show_share * max(self._tenant_s.get((priority, tenant), 0.0), 0.0),
        )

    def _expire(self, now: float) -> None:
        while self._expiry and (not self._expiry[0][2].open or self._expiry[0][0] <= now):
            missed = heapq.heappop(self._expiry)[2]
            if missed.open:
                self._close(missed)
                self.show_share -= _SMOOTHING * self.show_share

    def _close(self, made: _Appointment) -> None:
        made.open = False
        mine = self._by_key[made.key]
        mine.remove(made)
        if not mine:
            del self._by_key[made.key]
        self._add(made, -made.work_s)

    def _add(self, made: _Appointment, work_s: float) -> None:
        whose = (made.priority, made.tenant)
        self._class_s[made.priority] += work_s
        self._tenant_s[whose] = self._tenant_s.get(whose, 0.0) + work_s
        if self._tenant_s[whose] <= 1e-9:  # floats drift
            del self._tenant_s[whose]


def _key(ticket: Ticket) -> Hashable:
    """The last hash of a prompt stands for all of it; without one, its size has to do."""
    prompt = ticket.prefix[-1] if ticket.prefix else ticket.prompt_tokens
    return ticket.principal.tenant, ticket.principal.priority, ticket.sequences, prompt
