"""Who runs next, and where: the state machine of one model's request queue.

Pure: every method takes `now` (monotonic seconds of the queue's process) and returns the outcomes to deliver.
Owns what becomes of each ticket and the counts of the conservation sum. Who is let in is `entrance`'s, the order
`fairness`', replicas and their credit `pool`'s; `placement` joins the last two. `actors.batching_queue` feeds it and
carries its outcomes; simulations and tests drive the same object.

The head of the line waits until it fits, so a large request is never overtaken for ever by small ones.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

from actors.errors import DeadlineExceeded
from actors.policies.admission import ServiceEstimator
from actors.policies.credit import Held, ReplicaCredit
from actors.policies.decisions import (
    Decision,
    DispatchSettings,
    Granted,
    Lost,
    Outcome,
    Refused,
    ReplicaReport,
)
from actors.policies.entrance import Entrance
from actors.policies.fairness import WaitingLine
from actors.policies.marks import Marks
from actors.policies.placement import Placement
from actors.policies.pool import Pool
from actors.policies.service_record import ServiceRecord
from actors.policies.waiting import Waiting
from actors.types import Principal, PriorityClass, Ticket

_HOPE = 0.9  # of the expected service time; with less left, a slot is better used by the next
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
    line: WaitingLine = field(init=False)
    pool: Pool = field(init=False)
    entrance: Entrance = field(init=False)
    placement: Placement = field(init=False)
    record: ServiceRecord = field(init=False)
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    accepted: int = 0  # requests taken in, refused ones too
    waits_s: list[tuple[PriorityClass, float]] = field(default_factory=list)  # of grants, until drained
    _returning: dict[str, Held] = field(default_factory=dict)  # by request id; between two attempts
    _ended: Marks = field(default_factory=lambda: Marks(_ENDED_S))  # request ids

    def __post_init__(self) -> None:
        self.line = WaitingLine(self.settings.class_weights, self.settings.tenant_weights)
        self.pool = Pool(self.settings)
        self.entrance = Entrance(line=self.line, pool=self.pool, rng=self.rng)
        self.placement = Placement(line=self.line, pool=self.pool)
        self.record = ServiceRecord(self.settings.ttft_slo_s, self.settings.tpot_slo_s)

    @property
    def estimator(self) -> ServiceEstimator:
        """How long requests hold their slots."""
        return self.entrance.estimator

    def submit(self, ticket: Ticket, gateway_id: str, now: float) -> list[Decision]:
        """Take a ticket into the line, or refuse it at once when its wait would pass its deadline."""
        if (waiting := self.line.get(ticket.request_id)) is not None:
            waiting.gateway_id = gateway_id  # its old connection was lost, which this queue may hear later
            return []
        held = self.pool.get(ticket.request_id)
        if held is not None and not self._unadopt(held):
            return self._grant_again(held, gateway_id)
        if self._returning.pop(ticket.request_id, None) is None:
            self.accepted += 1
        refusal = self.entrance.refusal(ticket, now)
        if refusal is not None:
            self._finish(ticket.request_id, "refused")
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

        Args:
            request_id: the ticket's.
            outcome: how this attempt ended.
            now: the time.
            output_tokens: what this attempt produced, as far as its gateway has seen it.
        """
        if outcome != "retried":
            self._ended.add(request_id, now)
        return self._end(request_id, outcome, now, output_tokens)

    def _end(self, request_id: str, outcome: Outcome, now: float, output_tokens: int = 0) -> list[Decision]:
        if (returning := self._returning.get(request_id)) is not None and outcome == "retried":
            self._charge_rest(returning, output_tokens)
            return []  # its replica was reported gone before: it is on its way back already
        if outcome == "retried" and request_id in self.line:
            return []  # it has come back already
        if self.line.leave(request_id) is not None or self._returning.pop(request_id, None) is not None:
            self._finish(request_id, outcome)
            return self._dispatch(now)  # it may have stood before others
        load = self.pool.load_of(request_id)
        held = self.pool.give_back(request_id)
        if held is None:
            return []
        self._charge_rest(held, output_tokens)
        if held.leaving_at is not None and outcome == "retried":
            self.placement.preemption.came_off(held)
        self._after_attempt(held, outcome)
        if outcome == "answered" and held.grant is not None:
            self.estimator.observe(
                service_s=now - held.granted_at,
                predicted_output_tokens=held.ticket.predicted_output_tokens,
            )
            self.record.answered(held, load, now)
        return self._dispatch(now)

    def gateway_gone(self, gateway_id: str, now: float) -> list[Decision]:
        """Forget everything of a gateway whose connection ended; the replicas cancel its streams."""
        theirs = self.line.of_gateway(gateway_id)
        theirs += [i for i, held in self._returning.items() if held.gateway_id == gateway_id]
        theirs += self.pool.of_gateway(gateway_id)
        decisions: list[Decision] = []
        for request_id in theirs:
            # Not `end`: what a replica still lists is booked again, if only this connection was lost.
            decisions += self._end(request_id, "cancelled", now)
        return decisions

    def report(self, report: ReplicaReport, now: float) -> list[Decision]:
        """Register a replica or refresh it; its list of running requests corrects the books."""
        replica = self.pool.report(report, now)
        if replica is None:
            return []
        for request_id in report.running:
            self._adopt(request_id, replica, now)
        for request_id, tokens in zip(report.running, report.produced_tokens, strict=False):
            if replica.produced(request_id, tokens):
                self._charge(replica.held[request_id])
        for request_id in replica.forgotten(report.running, now):
            if (held := self.pool.give_back(request_id)) is not None:
                self._after_attempt(held, "failed")
        return self._dispatch(now)

    def replica_draining(self, replica_id: str, now: float) -> None:
        """Give a replica nothing new: it has left a router and finishes what it runs.

        Remembered for replicas that are not known here, too: a new owner hears this before their reports.
        """
        self.pool.drain(replica_id, now)

    def replica_gone(self, replica_id: str, now: float) -> list[Decision]:
        """Drop a replica and its credit; the gateways that hold its tickets submit them again."""
        for held in self.pool.remove(replica_id, now):
            # Nobody here answers for an adopted one: its gateway, if it lives, submits it as a new one.
            self._after_attempt(held, "failed" if held.grant is None else "retried")
        return self._dispatch(now)

    def sweep(self, now: float) -> list[Decision]:
        """Give up replicas that have been silent too long, and tell every gateway. Call about twice a second."""
        decisions: list[Decision] = []
        for replica_id in self.pool.silent(now):
            decisions += [Lost(replica_id=replica_id), *self.replica_gone(replica_id, now)]
        for replica in self.pool.replicas.values():
            replica.count_back(now)
        return decisions

    def in_flight(self) -> int:
        """Requests in line, granted or between two attempts: the last term of the conservation sum."""
        return len(self.line) + len(self.pool) + len(self._returning)

    def _unadopt(self, held: Held) -> bool:
        """Free the credit of an adopted request that comes back: its gateway has given that replica up."""
        if held.grant is not None:
            return False
        self.pool.give_back(held.ticket.request_id)
        self._returning[held.ticket.request_id] = held
        return True

    def _grant_again(self, held: Held, gateway_id: str) -> list[Decision]:
        """Tell a grant over the connection that asks again: the one it was told over is lost."""
        if held.gateway_id == gateway_id or held.grant is None:
            return []
        held.gateway_id = gateway_id
        return [Granted(gateway_id=gateway_id, grant=held.grant)]

    def _dispatch(self, now: float) -> list[Decision]:
        """Grant what fits, and make room for what does not: the room is granted at once."""
        decisions: list[Decision] = []
        while True:
            decisions += self._grant(now)
            head = self.line.head()
            room = self.placement.make_room(head.ticket if head is not None else None, now)
            decisions += room
            if not room or head is None or head.ticket.principal.priority is PriorityClass.BATCH:
                return decisions

    def _grant(self, now: float) -> list[Decision]:
        decisions: list[Decision] = []
        while (head := self.line.head()) is not None:
            if head.deadline_at <= now:
                self.line.leave(head.ticket.request_id)
                self.record.missed(now)
                self._finish(head.ticket.request_id, "expired")
            elif self._is_late(head, now):
                self.record.missed(now)
                decisions.append(self._give_up(head))
            elif (granted := self.placement.place(head, now)) is not None:
                self.waits_s.append((head.ticket.principal.priority, granted.grant.waited_s))
                decisions.append(granted)
            else:
                break
        return decisions

    def _is_late(self, head: Waiting, now: float) -> bool:
        """Has it waited until it cannot be expected to end in time?

        One that a fault brought back has begun already.
        """
        if head.ticket.returning or head.arrived_at == now or not self.estimator.observed:
            return False
        return head.deadline_at - now < _HOPE * self.estimator.service_s(head.ticket)

    def _give_up(self, head: Waiting) -> Refused:
        request_id = head.ticket.request_id
        self.line.leave(request_id)
        self._finish(request_id, "expired")
        late = DeadlineExceeded("no free slot in time: too little is left until the request's deadline")
        return Refused(gateway_id=head.gateway_id, request_id=request_id, error=late)

    def _adopt(self, request_id: str, replica: ReplicaCredit, now: float) -> None:
        """Book what a replica runs and this queue never granted: it is a new owner.

        A request that waits here, too, is running its last steps on a replica that was given up.
        """
        if request_id in self.pool or request_id in self.line or request_id in self._returning:
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
        self.pool.take(replica, Held(ticket=ticket, gateway_id="", granted_at=now))
        self.accepted += 1

    def _charge_rest(self, held: Held, output_tokens: int) -> None:
        """Charge what was produced after the last report."""
        if output_tokens > held.produced:
            held.produced = output_tokens
            self._charge(held)

    def _charge(self, held: Held) -> None:
        """Charge what was produced beyond the prediction."""
        if held.grant is not None and held.produced > held.charged:  # whose an adopted one is nobody knows
            self.line.charge_output(held.ticket, held.produced - held.charged)
            held.charged = held.produced

    def _after_attempt(self, held: Held, outcome: Outcome) -> None:
        if held.grant is not None:
            self.line.released(held.ticket)
            self.line.charge_output(held.ticket, held.produced - held.charged)
            held.charged = held.produced
        if outcome == "retried":
            self._returning[held.ticket.request_id] = held
        else:
            self._finish(held.ticket.request_id, outcome)

    def _finish(self, request_id: str, outcome: Outcome) -> None:
        self.outcomes[outcome] += 1
        self.placement.preemption.forget(request_id)
