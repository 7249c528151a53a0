"""Who runs next, and where: the state machine of one model's request queue.

Pure: every method takes `now` (monotonic seconds of the queue's process) and returns the outcomes to deliver.
Owns the line, the replicas' credit and the counts of the conservation sum. `actors.batching_queue` feeds it
and carries its outcomes; simulations and tests drive the same object.

The head of the line waits until it fits, so a large request is never overtaken for ever by small ones, and a
lower class never passes a waiting higher one.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

from actors.errors import ShoalError
from actors.policies.admission import Capacity, ServiceEstimator, predicted_wait_s, refusal
from actors.policies.credit import Held, ReplicaCredit
from actors.policies.decisions import Decision, DispatchSettings, Granted, Outcome, Refused, ReplicaReport
from actors.policies.fairness import Waiting, WaitingLine
from actors.policies.marks import Marks
from actors.types import Grant, Principal, PriorityClass, Ticket

_ENDED_S = 5.0  # a report that was on its way when a request ended may still list it


@dataclass(slots=True)
class Dispatcher:
    """The queue of one model.

    Args:
        settings: bounds.
        rng: source of the Retry-After jitter.
    """

    settings: DispatchSettings = field(default_factory=DispatchSettings)
    rng: random.Random = field(default_factory=random.Random)
    estimator: ServiceEstimator = field(default_factory=ServiceEstimator)
    line: WaitingLine = field(default_factory=WaitingLine)
    replicas: dict[str, ReplicaCredit] = field(default_factory=dict)
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    accepted: int = 0  # requests taken in, refused ones too
    waits_s: list[tuple[PriorityClass, float]] = field(default_factory=list)  # of grants, until drained
    start_up_s: float | None = None  # the last measured one
    slots_per_replica: int = 0  # of the last replica that registered; 0: there was none
    _granted_on: dict[str, str] = field(default_factory=dict)  # request id → replica id
    _returning: dict[str, str] = field(default_factory=dict)  # retried request id → gateway id
    _ended: Marks = field(default_factory=lambda: Marks(_ENDED_S))  # request ids
    _banned: Marks = field(init=False)  # replica ids
    _draining: Marks = field(init=False)  # replica ids, known here or not

    def __post_init__(self) -> None:
        self._banned = Marks(self.settings.banned_s)
        self._draining = Marks(self.settings.draining_s)

    def submit(self, ticket: Ticket, gateway_id: str, now: float) -> list[Decision]:
        """Take a ticket into the line, or refuse it at once when its wait would pass its deadline."""
        if (waiting := self.line.get(ticket.request_id)) is not None:
            waiting.gateway_id = gateway_id  # its old connection was lost, which this queue may hear later
            return []
        if ticket.request_id in self._granted_on and not self._unadopt(ticket.request_id, gateway_id):
            return self._grant_again(ticket.request_id, gateway_id)
        if self._returning.pop(ticket.request_id, None) is None:
            self.accepted += 1
        refusal = self._refusal(ticket)
        if refusal is not None:
            self.outcomes["refused"] += 1
            return [Refused(gateway_id=gateway_id, request_id=ticket.request_id, error=refusal)]
        self.line.join(
            Waiting(
                ticket=ticket,
                gateway_id=gateway_id,
                arrived_at=now - ticket.waited_s,
                deadline_at=now + ticket.timeout_s,
                work_s=self.estimator.work_s(ticket),
            )
        )
        return self._dispatch(now)

    def end(self, request_id: str, outcome: Outcome, now: float, output_tokens: int = 0) -> list[Decision]:
        """End a ticket wherever it is: in line, running, or between two attempts; unknown ids are ignored.

        Its caller left or its deadline passed while it waited, or its generation ended.
        """
        del output_tokens
        if outcome != "retried":
            self._ended.add(request_id, now)
        return self._end(request_id, outcome, now)

    def _end(self, request_id: str, outcome: Outcome, now: float) -> list[Decision]:
        if request_id in self._returning and outcome == "retried":
            return []  # its replica was reported gone before: it is on its way back already
        if self.line.leave(request_id) is not None or self._returning.pop(request_id, None) is not None:
            self.outcomes[outcome] += 1
            return []
        replica = self.replicas.get(self._granted_on.pop(request_id, ""))
        held = replica.give_back(request_id) if replica is not None else None
        if held is None:
            return []
        self._count_end(held, outcome)
        if outcome == "answered" and held.grant is not None:
            self.estimator.observe(
                service_s=now - held.granted_at,
                predicted_output_tokens=held.ticket.predicted_output_tokens,
            )
        return self._dispatch(now)

    def gateway_gone(self, gateway_id: str, now: float) -> list[Decision]:
        """Forget everything of a gateway whose connection ended; the replicas cancel its streams."""
        theirs = self.line.of_gateway(gateway_id)
        theirs += [i for i, owner in self._returning.items() if owner == gateway_id]
        for replica in self.replicas.values():
            theirs += [i for i, held in replica.held.items() if held.gateway_id == gateway_id]
        decisions: list[Decision] = []
        for request_id in theirs:
            # Not `end`: what a replica still lists is booked again, if only this connection was lost.
            decisions += self._end(request_id, "cancelled", now)
        return decisions

    def report(self, report: ReplicaReport, now: float) -> list[Decision]:
        """Register a replica or refresh it; its list of running requests corrects the books."""
        if self._banned.has(report.replica_id, now):
            return []
        replica = self.replicas.get(report.replica_id)
        if replica is None:
            replica = self.replicas[report.replica_id] = ReplicaCredit(
                replica_id=report.replica_id,
                max_sequences=report.max_sequences,
                kv_tokens=report.kv_tokens,
                look_ahead=self.settings.look_ahead,
                last_report_at=now,
            )
        replica.last_report_at = now
        replica.draining = self._draining.has(report.replica_id, now)
        self.start_up_s, self.slots_per_replica = report.start_up_s, report.max_sequences
        for request_id in report.running:
            self._adopt(request_id, replica, now)
        for request_id in replica.forgotten(report.running, now):
            self._granted_on.pop(request_id, None)
            self._count_end(replica.give_back(request_id), "failed")
        return self._dispatch(now)

    def replica_draining(self, replica_id: str, now: float) -> None:
        """Give a replica nothing new: it has left a router and finishes what it runs.

        Remembered for replicas that are not known here, too: a new owner hears this before their reports.
        """
        self._draining.add(replica_id, now)
        if (replica := self.replicas.get(replica_id)) is not None:
            replica.draining = True

    def replica_gone(self, replica_id: str, now: float) -> list[Decision]:
        """Drop a replica and its credit; the gateways that hold its tickets submit them again."""
        replica = self.replicas.pop(replica_id, None)
        # Its last reports may still be under way; one that lives on may come back later.
        self._banned.add(replica_id, now)
        if replica is not None:
            for request_id, held in replica.held.items():
                self._granted_on.pop(request_id, None)
                # Nobody here answers for an adopted one: its gateway, if it lives, submits it as a new one.
                self._count_end(held, "failed" if held.grant is None else "retried")
        return self._dispatch(now)

    def sweep(self, now: float) -> list[Decision]:
        """Drop replicas that have been silent too long. Call about twice a second."""
        silent = [
            replica.replica_id
            for replica in self.replicas.values()
            if now - replica.last_report_at > self.settings.dead_after_s
        ]
        return [decision for replica_id in silent for decision in self.replica_gone(replica_id, now)]

    def running_sequences(self) -> int:
        """Sequences that hold credit, without those granted ahead."""
        return sum(min(r.sequences, r.max_sequences) for r in self.replicas.values())

    def waiting_ahead_sequences(self) -> int:
        """Sequences granted ahead: they wait in an engine."""
        return sum(max(r.sequences - r.max_sequences, 0) for r in self.replicas.values())

    def in_flight(self) -> int:
        """Requests in line, granted or between two attempts: the last term of the conservation sum."""
        return len(self.line) + len(self._granted_on) + len(self._returning)

    def capacity(self) -> Capacity:
        """What the replicas can run now."""
        replicas = [r for r in self.replicas.values() if not r.draining]
        expected_s = self.settings.expected_start_up_s
        return Capacity(
            slots=sum(r.max_sequences for r in replicas),
            free_slots=sum(max(r.max_sequences - r.sequences, 0) for r in replicas),
            start_up_s=self.start_up_s if self.start_up_s is not None else expected_s,
            slots_per_replica=max(self.slots_per_replica, 1),
        )

    def _refusal(self, ticket: Ticket) -> ShoalError | None:
        ahead_s = self.line.work_s(up_to=ticket.principal.priority)
        return refusal(
            ticket,
            predicted_s=predicted_wait_s(
                work_ahead_s=ahead_s, capacity=self.capacity(), estimator=self.estimator
            ),
            service_s=self.estimator.service_s(ticket),
            full=len(self.line) >= self.settings.max_waiting,
            jitter=self.rng.random(),
        )

    def _unadopt(self, request_id: str, gateway_id: str) -> bool:
        """Free the credit of an adopted request that comes back: its gateway has given that replica up."""
        replica = self.replicas[self._granted_on[request_id]]
        if replica.held[request_id].grant is not None:
            return False
        replica.give_back(request_id)
        del self._granted_on[request_id]
        self._returning[request_id] = gateway_id
        return True

    def _grant_again(self, request_id: str, gateway_id: str) -> list[Decision]:
        """Tell a grant over the connection that asks again: the one it was told over is lost."""
        held = self.replicas[self._granted_on[request_id]].held[request_id]
        if held.gateway_id == gateway_id or held.grant is None:
            return []
        held.gateway_id = gateway_id
        return [Granted(gateway_id=gateway_id, grant=held.grant)]

    def _dispatch(self, now: float) -> list[Decision]:
        granted: list[Decision] = []
        for priority in PriorityClass:
            while (head := self.line.head(priority)) is not None:
                if head.deadline_at <= now:
                    self.line.leave(head.ticket.request_id)
                    self.outcomes["expired"] += 1
                elif (replica := self._choose(head.ticket, now)) is not None:
                    granted.append(self._grant(head, replica, now))
                else:
                    return granted
        return granted

    def _choose(self, ticket: Ticket, now: float) -> ReplicaCredit | None:
        able = [
            replica
            for replica in self.replicas.values()
            if not replica.draining
            and now - replica.last_report_at <= self.settings.stale_after_s
            and replica.fits(ticket)
        ]
        return min(able, key=ReplicaCredit.load, default=None)

    def _grant(self, head: Waiting, replica: ReplicaCredit, now: float) -> Granted:
        ticket = head.ticket
        self.line.leave(ticket.request_id)
        waited_s = now - head.arrived_at
        self.waits_s.append((ticket.principal.priority, waited_s))
        grant = Grant(
            request_id=ticket.request_id,
            replica_id=replica.replica_id,
            waited_s=waited_s,
            attempt=ticket.attempt,
        )
        replica.take(Held(ticket=ticket, gateway_id=head.gateway_id, granted_at=now, grant=grant))
        self._granted_on[ticket.request_id] = replica.replica_id
        return Granted(gateway_id=head.gateway_id, grant=grant)

    def _adopt(self, request_id: str, replica: ReplicaCredit, now: float) -> None:
        """Book what a replica runs and this queue never granted: it is a new owner.

        A request that waits here, too, is running its last steps on a replica that was given up.
        """
        if request_id in self._granted_on or request_id in self.line or request_id in self._returning:
            return
        if self._ended.has(request_id, now):
            return
        ticket = Ticket(
            request_id=request_id,
            principal=Principal(tenant=""),
            prompt_tokens=0,
            predicted_output_tokens=int(self.estimator.mean_output_tokens),
            timeout_s=0.0,
        )
        replica.take(Held(ticket=ticket, gateway_id="", granted_at=now))
        self._granted_on[request_id] = replica.replica_id
        self.accepted += 1

    def _count_end(self, held: Held | None, outcome: Outcome) -> None:
        if held is None:
            return
        if outcome == "retried":
            self._returning[held.ticket.request_id] = held.gateway_id
        else:
            self.outcomes[outcome] += 1
