"""Batch fills only what is left: which batch requests give their place up to a higher class.

Pure. Called by `actors.policies.dispatch`. A request that gives its place up comes back with what it has produced,
so it loses the reading of its prompt and no more; the one with the least goes first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from actors.policies.credit import Held, ReplicaCredit, ticket_tokens
from actors.types import PriorityClass, Ticket

_FRUITLESS = 3  # stints without a token; then it is left alone until it has one
_MOST_MOVES = 2  # of one that is not batch: its reader sees a pause each time
_MOST_OUTPUT = 3.0  # tokens of all stints over what was predicted: it begins again each time, as some have to
QUIET_S = (
    1.0  # while higher classes wait now and then, batch is not granted ahead: it would stand before them
)

_Candidate = tuple[ReplicaCredit, Held]


@dataclass(slots=True)
class _Record:
    stints: int = 0  # that ended because it was told to leave
    fruitless: int = 0  # the last ones, in a row
    produced: int = 0  # tokens of earlier stints


@dataclass(slots=True)
class Preemption:
    """Who gave a place up before, and who is to do it now."""

    _records: dict[str, _Record] = field(default_factory=dict)  # request id → of those still in flight
    _pressed_at: float = -math.inf

    def stays(self, ticket: Ticket) -> bool:
        """Was it sent away often enough? Batch that goes on behind what it has never was; some begins again."""
        record = self._records.get(ticket.request_id)
        if record is None:
            return False
        if ticket.principal.priority is not PriorityClass.BATCH:
            return record.stints >= _MOST_MOVES
        return record.produced > _MOST_OUTPUT * ticket.predicted_output_tokens * ticket.sequences

    def fruitless(self, ticket: Ticket) -> bool:
        """Was it sent away so often without a token that it is to produce one first?"""
        record = self._records.get(ticket.request_id)
        return record is not None and record.fruitless >= _FRUITLESS

    def came_off(self, held: Held) -> None:
        """It has left its replica because it was told to."""
        record = self._records.setdefault(held.ticket.request_id, _Record())
        record.stints += 1
        record.fruitless = 0 if held.produced else record.fruitless + 1
        record.produced += held.produced

    def forget(self, request_id: str) -> None:
        """It has ended."""
        self._records.pop(request_id, None)

    def pressed(self, now: float) -> None:
        """A higher class found no free slot."""
        self._pressed_at = now

    def quiet(self, now: float) -> bool:
        """Has no higher class waited lately?"""
        return now - self._pressed_at > QUIET_S

    def victims(
        self, replicas: Sequence[ReplicaCredit], head: Ticket | None, waiting_sequences: int
    ) -> list[_Candidate]:
        """Who is to give a place up now: as few as needed, those who are leaving already counted.

        Args:
            replicas: those that get new tickets.
            head: the ticket of a higher class that fits nowhere, if there is one.
            waiting_sequences: sequences of higher classes in line, its own included.
        """
        candidates = [(r, held) for r in replicas for held in r.held.values() if held.can_leave()]
        candidates.sort(key=self._least_produced)
        chosen = _for_slots(replicas, candidates, waiting_sequences)
        return chosen or (_for_memory(replicas, candidates, head) if head is not None else [])

    def _least_produced(self, candidate: _Candidate) -> tuple[int, float]:
        _, held = candidate
        record = self._records.get(held.ticket.request_id)
        return held.produced + (record.produced if record is not None else 0), -held.granted_at


def _for_slots(
    replicas: Sequence[ReplicaCredit], candidates: Sequence[_Candidate], waiting_sequences: int
) -> list[_Candidate]:
    """So many that nobody of a higher class waits, in the engines' own lines or in this one."""
    free = {replica.replica_id: replica.free_sequences() for replica in replicas}
    wanted = waiting_sequences - sum(max(slots, 0) for slots in free.values())
    chosen: list[_Candidate] = []
    for replica, held in candidates:
        before = free[replica.replica_id]
        if wanted <= 0 and (before >= 0 or not _one_waits_on(replica)):
            continue
        after = free[replica.replica_id] = before + held.ticket.sequences
        wanted -= max(after, 0) - max(before, 0)
        chosen.append((replica, held))
    return chosen


def _one_waits_on(replica: ReplicaCredit) -> bool:
    """Does one of a higher class wait in the engine, as far as is known?"""
    return any(
        held.ahead and not held.produced and held.ticket.principal.priority is not PriorityClass.BATCH
        for held in replica.held.values()
    )


def _for_memory(
    replicas: Sequence[ReplicaCredit], candidates: Sequence[_Candidate], head: Ticket
) -> list[_Candidate]:
    """Slots are free, KV memory is not: make room on the replica where the fewest have to go."""
    needed = ticket_tokens(head)
    if any(replica.free_tokens() >= needed or replica.emptying() for replica in replicas):
        return []  # room is on its way
    best: list[_Candidate] = []
    for replica in replicas:
        free, going = replica.free_tokens(), list[_Candidate]()
        for candidate in candidates:
            if free < needed and candidate[0] is replica:
                going.append(candidate)
                free += candidate[1].tokens()
        staying = sum(held.leaving_at is None for held in replica.held.values()) - len(going)
        # One that is larger than the whole replica may run there alone.
        if going and (free >= needed or not staying) and (not best or len(going) < len(best)):
            best = going
    return best
