"""One run of a request on one replica: between its bus and the generation it belongs to.

Made by `actors.handles.generation`; the bus pushes into it. Owns that the grant is freed exactly once, whatever
happens. What follows from a failure is the generation's.
"""

from __future__ import annotations

import time
from typing import Protocol

from actors.errors import ClientClosed, DeadlineExceeded, EngineFailed, Overloaded, ShoalError
from actors.handles.llm import RunningStream
from actors.handles.queue import QueueClient
from actors.policies.decisions import Outcome
from actors.types import Grant, TokenDelta


class AttemptOwner(Protocol):
    """Who is told what an attempt brings."""

    def decoding(self, attempt: Attempt, first_token_s: float) -> None:
        """Its first delta has come, so long after its start."""

    def take(self, delta: TokenDelta) -> None:
        """A delta of it."""

    def failed(self, attempt: Attempt, error: ShoalError) -> Outcome:
        """It failed; returns what its ticket has come to."""


class Attempt:
    """One run on one replica, as the bus sees it; frees its grant exactly once."""

    __slots__ = ("_begun", "_grant", "_over", "_owner", "_queue", "_started_at", "_tokens", "running")

    def __init__(self, owner: AttemptOwner, queue: QueueClient, grant: Grant) -> None:
        self._owner = owner
        self._queue = queue
        self._grant = grant
        self._started_at = time.monotonic()
        self._begun = False
        self._over = False
        self._tokens = 0
        self.running: RunningStream | None = None

    @property
    def ticket_id(self) -> str:
        """The request's, or that of its second start."""
        return self._grant.request_id

    @property
    def replica_id(self) -> str:
        """Where it runs."""
        return self._grant.replica_id

    @property
    def begun(self) -> bool:
        """It has had its first delta."""
        return self._begun

    @property
    def ended(self) -> bool:
        """The engine is done with it, or it was left."""
        return self._over

    def push(self, delta: TokenDelta) -> None:
        """A delta from the bus."""
        if self._over:
            return
        if not self._begun:
            self._begun = True
            self._owner.decoding(self, time.monotonic() - self._started_at)
        self._tokens += len(delta.token_ids)
        if delta.usage is not None:
            self._free("answered")
        self._owner.take(delta)

    def end(self, error: ShoalError) -> None:
        """The bus or the engine failed."""
        if self._over:
            return
        self._over = True
        if isinstance(error, EngineFailed):
            self._queue.gone(self._grant.replica_id)  # its bus is open, but nothing more runs there
        outcome = self._owner.failed(self, error)
        self._queue.end(self._grant.request_id, outcome, self._tokens)

    def leave(self, outcome: Outcome) -> None:
        """Stop it in the engine; nothing happens when it is over."""
        if self._over:
            return
        self._free(outcome)
        if self.running is not None:
            self.running.cancel()

    def _free(self, outcome: Outcome) -> None:
        self._over = True
        self._queue.end(self._grant.request_id, outcome, self._tokens)


def outcome_of(error: ShoalError) -> Outcome:
    """How a ticket's life ended, by the error that ended it."""
    if isinstance(error, DeadlineExceeded):
        return "expired"
    if isinstance(error, Overloaded):
        return "refused"
    return "cancelled" if isinstance(error, ClientClosed) else "failed"
