"""Credit of one replica: what it can run and what it has been given.

Pure. Called by `actors.policies.pool`; a replica's report is the truth about what it runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from actors.policies.prefix import KnownPrefixes
from actors.types import Grant, PriorityClass, Ticket

REPORT_GRACE_S = 5.0  # a grant may be under way this long before its replica must list it as running

LEAVE_GRACE_S = 2.0  # a request that was told to leave is away long before


@dataclass(slots=True)
class Held:
    """A granted ticket that holds credit."""

    ticket: Ticket
    gateway_id: str
    granted_at: float
    grant: Grant | None = None  # None: adopted, it runs there without a grant of this queue
    charged: int = 0  # output tokens that its tenant was charged for
    produced: int = 0  # output tokens that were reported
    stays: bool = False  # it had its turn before higher classes, was sent away often enough, or is in a hurry
    ahead: bool = False  # it was granted beyond what the engine runs, and may wait there
    first_token: bool = False  # it stays until it has produced one: it was sent away before that often enough
    leaving_at: float | None = None  # when its gateway was told to give it up

    def tokens(self) -> int:
        """KV-cache tokens to keep for it: what was predicted, or what it has come to."""
        output = max(self.ticket.predicted_output_tokens * self.ticket.sequences, self.produced)
        return self.ticket.prompt_tokens + output

    def can_leave(self) -> bool:
        """May a higher class have its place?"""
        stays = self.first_token and not self.produced
        return self.ticket.principal.priority is PriorityClass.BATCH and not stays and self.can_move()

    def can_move(self) -> bool:
        """May another tenant of its class have its place?"""
        granted = self.grant is not None and self.leaving_at is None
        return granted and self.ticket.preemptible and not self.stays


@dataclass(slots=True)
class ReplicaCredit:
    """Sequences and KV tokens of one replica, less what granted tickets hold.

    `look_ahead` sequences more than the engine runs may be granted, so that a freed slot is refilled
    without a round trip.
    """

    replica_id: str
    max_sequences: int
    kv_tokens: int
    look_ahead: int
    last_report_at: float
    held: dict[str, Held] = field(default_factory=dict)
    sequences: int = 0
    tokens: int = 0
    leaving_sequences: int = 0  # of those held: they are on their way out
    leaving_tokens: int = 0
    yielding_sequences: int = 0  # of those held: they may be told to leave
    draining: bool = False  # finishes what it holds and gets nothing new; renewed with each report
    prefixes: KnownPrefixes = field(init=False)

    def __post_init__(self) -> None:
        self.prefixes = KnownPrefixes(self.kv_tokens)

    def fits(self, ticket: Ticket, *, ahead: bool = True) -> bool:
        """Is there credit for the ticket? One that is larger than the whole replica may run alone.

        The place of one that is leaving is free: it is away before what is granted now begins.

        Args:
            ticket: the ticket.
            ahead: it may wait in the engine, too.
        """
        if not self.held:
            return True
        slots = self.free_sequences() + (self.look_ahead if ahead else 0)
        return ticket.sequences <= slots and ticket_tokens(ticket) <= self.free_tokens()

    def has_suspect(self) -> bool:
        """Does one run here that may have killed two replicas, and has no token yet?"""
        return any(held.ticket.suspect and not held.produced for held in self.held.values())

    def free_sequences(self) -> int:
        """Slots free once those who are leaving have left; negative: so many wait in the engine."""
        return self.max_sequences - self.sequences + self.leaving_sequences

    def free_tokens(self) -> int:
        """KV tokens free once those who are leaving have left."""
        return self.kv_tokens - self.tokens + self.leaving_tokens

    def emptying(self) -> bool:
        """Does everything that is left here leave?"""
        return all(held.leaving_at is not None for held in self.held.values())

    def load(self) -> float:
        """Share of the scarcer credit in use."""
        return max(self.sequences / max(self.max_sequences, 1), self.tokens / max(self.kv_tokens, 1))

    def take(self, held: Held) -> None:
        """Give credit to a ticket."""
        self.held[held.ticket.request_id] = held
        self.sequences += held.ticket.sequences
        self.tokens += held.tokens()
        if held.can_leave():
            self.yielding_sequences += held.ticket.sequences
        self.prefixes.add(held.ticket.prefix)

    def give_back(self, request_id: str) -> Held | None:
        """Take a ticket's credit back; unknown ids are ignored."""
        held = self.held.pop(request_id, None)
        if held is not None:
            self.sequences -= held.ticket.sequences
            self.tokens -= held.tokens()
            if held.can_leave():
                self.yielding_sequences -= held.ticket.sequences
            if held.leaving_at is not None:
                self.leaving_sequences -= held.ticket.sequences
                self.leaving_tokens -= held.tokens()
        return held

    def produced(self, request_id: str, tokens: int) -> int:
        """The replica reports what a request has produced there; returns what is new of it.

        More than was predicted takes more credit, also beyond what the replica has: nothing new fits then.
        """
        held = self.held.get(request_id)
        if held is None or tokens <= held.produced:
            return 0
        new, before, stayed = tokens - held.produced, held.tokens(), not held.can_leave()
        held.produced = tokens
        if stayed and held.can_leave():
            self.yielding_sequences += held.ticket.sequences
        self.tokens += held.tokens() - before
        if held.leaving_at is not None:
            self.leaving_tokens += held.tokens() - before
        return new

    def send_away(self, held: Held, now: float) -> None:
        """Its gateway is told to give it up; until it does, it keeps its credit."""
        if held.can_leave():
            self.yielding_sequences -= held.ticket.sequences
        held.leaving_at = now
        self.leaving_sequences += held.ticket.sequences
        self.leaving_tokens += held.tokens()

    def count_back(self, now: float) -> None:
        """Those who should have left by now stay, and may be told again: the message met them between two steps."""
        missed = False
        for held in self.held.values():
            if held.leaving_at is not None and now - held.leaving_at > LEAVE_GRACE_S:
                missed = True
                held.leaving_at = None
                self.leaving_sequences -= held.ticket.sequences
                self.leaving_tokens -= held.tokens()
                if held.can_leave():
                    self.yielding_sequences += held.ticket.sequences
        for held in self.held.values() if missed else ():
            held.ahead = held.ahead or not held.produced  # it may wait for the place that was not given up

    def forgotten(self, running: Iterable[str], now: float) -> list[str]:
        """Tickets that hold credit here and that the replica, past the grace, does not run.

        What it listed before needs no grace: no grant is under way.
        """
        listed = set(running)
        return [
            request_id
            for request_id, held in self.held.items()
            if request_id not in listed and (held.grant is None or now - held.granted_at > REPORT_GRACE_S)
        ]


def ticket_tokens(ticket: Ticket) -> int:
    """KV-cache tokens a ticket may come to need: its prompt once, and each sequence's output."""
    return ticket.prompt_tokens + ticket.predicted_output_tokens * ticket.sequences
