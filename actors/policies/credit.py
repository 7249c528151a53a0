"""Credit of one replica: what it can run and what it has been given.

Pure. Called by `actors.policies.dispatch`; a replica's report is the truth about what it runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from actors.types import Grant, Ticket

REPORT_GRACE_S = 5.0  # a grant may be under way this long before its replica must list it as running


@dataclass(slots=True)
class Held:
    """A granted ticket that holds credit."""

    ticket: Ticket
    gateway_id: str
    granted_at: float
    grant: Grant | None = None  # None: adopted, it runs there without a grant of this queue


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
    draining: bool = False  # finishes what it holds and gets nothing new; renewed with each report

    def fits(self, ticket: Ticket) -> bool:
        """Is there credit for the ticket? One that is larger than the whole replica may run alone."""
        if not self.held:
            return True
        return (
            self.sequences + ticket.sequences <= self.max_sequences + self.look_ahead
            and self.tokens + ticket_tokens(ticket) <= self.kv_tokens
        )

    def load(self) -> float:
        """Share of the scarcer credit in use."""
        return max(self.sequences / max(self.max_sequences, 1), self.tokens / max(self.kv_tokens, 1))

    def take(self, held: Held) -> None:
        """Give credit to a ticket."""
        self.held[held.ticket.request_id] = held
        self.sequences += held.ticket.sequences
        self.tokens += ticket_tokens(held.ticket)

    def give_back(self, request_id: str) -> Held | None:
        """Take a ticket's credit back; unknown ids are ignored."""
        held = self.held.pop(request_id, None)
        if held is not None:
            self.sequences -= held.ticket.sequences
            self.tokens -= ticket_tokens(held.ticket)
        return held

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
