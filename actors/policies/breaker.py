"""A circuit breaker: stop asking a part that keeps failing, and notice when it is well again.

Pure: the clock is an argument, in monotonic seconds. `actors.retriever` keeps one per part it calls. What
counts as a failure is the caller's to say.

    closed ── `failures_to_open` failures in a row ──▶ open ── after `open_s` ──▶ half open
      ▲                                                  ▲                          │
      └──────────────── probe succeeded ─────────────────┼── probe failed (open_s doubles)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BreakerState = Literal["closed", "open", "half_open"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BreakerPolicy:
    """When a circuit opens, and for how long."""

    failures_to_open: int = 5  # in a row
    open_s: float = 1.0  # before the first probe; doubles with each probe that fails
    max_open_s: float = 15.0  # the longest time between two probes
    probe_s: float = 5.0  # a probe that has not reported by then is given up for lost


class CircuitBreaker:
    """One circuit. Every `True` of `allow` is to be answered by `succeeded`, `failed` or `abandoned`.

    Args:
        policy: see `BreakerPolicy`.
    """

    def __init__(self, policy: BreakerPolicy | None = None) -> None:
        self._policy = policy or BreakerPolicy()
        self._failures = 0  # in a row
        self._opened_at: float | None = None
        self._open_s = self._policy.open_s
        self._probe_since: float | None = None

    def state(self, now: float) -> BreakerState:
        """Half open: the next call is a probe, or one is under way."""
        if self._opened_at is None:
            return "closed"
        return "open" if now - self._opened_at < self._open_s else "half_open"

    def allow(self, now: float) -> bool:
        """May the part be called now? While half open, one call at a time may: the probe."""
        state = self.state(now)
        if state != "half_open":
            return state == "closed"
        if self._probe_since is not None and now - self._probe_since < self._policy.probe_s:
            return False
        self._probe_since = now
        return True

    def succeeded(self) -> None:
        """A call was answered: the part is well."""
        self._failures = 0
        self._opened_at = self._probe_since = None
        self._open_s = self._policy.open_s

    def failed(self, now: float) -> None:
        """A call failed through the part's fault."""
        self._failures += 1
        state = self.state(now)
        if state == "half_open":
            self._open_s = min(2 * self._open_s, self._policy.max_open_s)
            self._opened_at, self._probe_since = now, None
        elif state == "closed" and self._failures >= self._policy.failures_to_open:
            self._opened_at = now

    def abandoned(self) -> None:
        """A call ended without telling anything about the part: its caller left or had too little time."""
        self._probe_since = None

    def retry_after_s(self, now: float) -> float:
        """Seconds until the next probe; 0 when calls are allowed."""
        if self._opened_at is None:
            return 0.0
        return max(0.0, self._opened_at + self._open_s - now)
