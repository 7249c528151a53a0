"""The replicas of one model as its queue knows them: who is there, who holds what, who gets the next ticket.

Pure. Called by `actors.policies.dispatch`, which decides what becomes of the tickets.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from actors.policies.admission import Capacity
from actors.policies.credit import Held, ReplicaCredit
from actors.policies.decisions import DispatchSettings, ReplicaReport
from actors.policies.marks import Marks
from actors.types import PriorityClass, Ticket

_SWEPT_WITHIN_S = (
    1.0  # the caller of `silent` promises twice a second; later, it was the queue that stood still
)


@dataclass(slots=True)
class Pool:
    """Replicas, their credit, and which ticket holds credit where."""

    settings: DispatchSettings
    replicas: dict[str, ReplicaCredit] = field(default_factory=dict)
    start_up_s: float | None = None  # the last measured one
    slots_per_replica: int = 0  # of the last replica that registered; 0: there was none
    kv_tokens_per_replica: int = 0  # the same
    _granted_on: dict[str, str] = field(default_factory=dict)  # request id → replica id
    _banned: Marks = field(init=False)  # replica ids
    _draining: Marks = field(init=False)  # replica ids, known here or not
    _swept_at: float | None = None

    def __post_init__(self) -> None:
        self._banned = Marks(self.settings.banned_s)
        self._draining = Marks(self.settings.draining_s)

    def __len__(self) -> int:
        """Tickets that hold credit."""
        return len(self._granted_on)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._granted_on

    def report(self, report: ReplicaReport, now: float) -> ReplicaCredit | None:
        """Register a replica or refresh it; None: it was given up a moment ago."""
        if self._banned.has(report.replica_id, now):
            return None
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
        self.kv_tokens_per_replica = report.kv_tokens
        return replica

    def drain(self, replica_id: str, now: float) -> None:
        """Give a replica nothing new. Remembered for replicas that are not known yet, too."""
        self._draining.add(replica_id, now)
        if (replica := self.replicas.get(replica_id)) is not None:
            replica.draining = True

    def remove(self, replica_id: str, now: float) -> list[Held]:
        """Drop a replica with its credit; returns what it held. It may register again later."""
        self._banned.add(replica_id, now)  # its last reports may still be under way
        replica = self.replicas.pop(replica_id, None)
        if replica is None:
            return []
        for request_id in replica.held:
            del self._granted_on[request_id]
        return list(replica.held.values())

    def silent(self, now: float) -> list[str]:
        """Replicas to be given up: silent, with another one to go on, or silent for long.

        Call about twice a second. When the queue itself stood still, its time does not count: the reports wait in
        its mailbox.
        """
        stood_still_s = now - self._swept_at - _SWEPT_WITHIN_S if self._swept_at is not None else 0.0
        self._swept_at = now
        if stood_still_s > 0.0:
            for replica in self.replicas.values():
                replica.last_report_at = min(replica.last_report_at + stood_still_s, now)
        patience_s = self.settings.silent_after_s
        if not any(self._usable(replica, now) for replica in self.replicas.values()):
            patience_s = self.settings.dead_after_s
        return [r.replica_id for r in self.replicas.values() if now - r.last_report_at > patience_s]

    def get(self, request_id: str) -> Held | None:
        """A ticket that holds credit."""
        replica = self.replicas.get(self._granted_on.get(request_id, ""))
        return replica.held[request_id] if replica is not None else None

    def load_of(self, request_id: str) -> float:
        """Share in use of the replica that runs a ticket; 0 for unknown ids."""
        replica = self.replicas.get(self._granted_on.get(request_id, ""))
        return replica.load() if replica is not None else 0.0

    def take(self, replica: ReplicaCredit, held: Held) -> None:
        """Give a ticket credit."""
        replica.take(held)
        self._granted_on[held.ticket.request_id] = replica.replica_id

    def give_back(self, request_id: str) -> Held | None:
        """Take a ticket's credit back; unknown ids are ignored."""
        replica = self.replicas.get(self._granted_on.pop(request_id, ""))
        return replica.give_back(request_id) if replica is not None else None

    def of_gateway(self, gateway_id: str) -> list[str]:
        """Request ids of one gateway that hold credit."""
        held = (item for replica in self.replicas.values() for item in replica.held.items())
        return [request_id for request_id, holder in held if holder.gateway_id == gateway_id]

    def choose(self, ticket: Ticket, now: float, *, ahead: bool = True) -> ReplicaCredit | None:
        """Where the ticket is to run; None: it fits nowhere.

        A free slot before a place in an engine's line, then the longest known beginning of its prompt, then the
        least load.

        Args:
            ticket: the ticket.
            now: the time.
            ahead: it may wait in the engine.
        """
        able = [
            replica
            for replica in self.usable(now)
            if replica.replica_id != ticket.avoid
            and replica.fits(ticket, ahead=ahead)
            and not (ticket.suspect and replica.has_suspect())
        ]
        if not able:
            return None
        return min(
            able,
            key=lambda replica: (
                ticket.sequences > replica.free_sequences(),
                -replica.prefixes.matched(ticket.prefix),
                replica.load(),
            ),
        )

    def usable(self, now: float) -> list[ReplicaCredit]:
        """Replicas that get new tickets."""
        return [replica for replica in self.replicas.values() if self._usable(replica, now)]

    def capacity(self, priority: PriorityClass) -> Capacity:
        """What the replicas can run now for a class: others see what batch would leave to them."""
        replicas = [r for r in self.replicas.values() if not r.draining]
        free_slots = sum(max(r.max_sequences - r.sequences, 0) for r in replicas)
        if priority is not PriorityClass.BATCH and self.settings.preempt_batch:
            free_slots += sum(r.yielding_sequences for r in replicas)
        expected_s = self.settings.expected_start_up_s
        return Capacity(
            slots=sum(r.max_sequences for r in replicas),
            free_slots=free_slots,
            start_up_s=self.start_up_s if self.start_up_s is not None else expected_s,
            slots_per_replica=max(self.slots_per_replica, 1),
        )

    def running_sequences(self) -> int:
        """Sequences that hold credit, without those granted ahead."""
        return sum(min(r.sequences, r.max_sequences) for r in self.replicas.values())

    def waiting_ahead_sequences(self) -> int:
        """Sequences granted ahead: they wait in an engine."""
        return sum(max(r.sequences - r.max_sequences, 0) for r in self.replicas.values())

    def yielding_sequences(self) -> int:
        """Sequences of batch that may be told to leave."""
        return sum(r.yielding_sequences for r in self.replicas.values())

    def _usable(self, replica: ReplicaCredit, now: float) -> bool:
        return not replica.draining and now - replica.last_report_at <= self.settings.silent_after_s
