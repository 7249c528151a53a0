"""When a request that has not begun to answer is started a second time, on another replica.

Pure. One object per gateway and model, used by `actors.handles.generation`. A replica that is dead or silent is
the queue's to find; this is for one that lives and is stuck before the first token. The cost is bounded: what
second starts may cost is a share of the tokens that were served.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from actors.policies.quantile import Quantile

_SHARE = 0.02  # of all tokens
_LATE = 0.95  # of requests have their first token by then
_PATIENCE = 3.0  # times that
_LEAST_S = 0.5
_OBSERVATIONS = 20  # before anything is called late
_MOST_SAVED_TOKENS = 20_000.0  # an hour without trouble is no licence for a storm


@dataclass(slots=True)
class Hedging:
    """How long to wait for a first token, and what a second start may cost."""

    _late_s: Quantile = field(default_factory=lambda: Quantile(_LATE))
    _budget_tokens: float = 0.0

    def delay_s(self) -> float | None:
        """Seconds from a start until a first token is overdue; None while too little is known."""
        if self._late_s.observed < _OBSERVATIONS:
            return None
        return max(_PATIENCE * self._late_s.value, _LEAST_S)

    def observe(self, first_token_s: float, prompt_tokens: int) -> None:
        """Learn from a start that has given its first token; its prompt earns budget."""
        self._late_s.observe(max(first_token_s, 1e-4))
        self._earn(prompt_tokens)

    def earn(self, output_tokens: int) -> None:
        """An answer of so many tokens was served."""
        self._earn(output_tokens)

    def spend(self, tokens: int) -> bool:
        """May a second start cost so many tokens? If so, they are taken from the budget."""
        if tokens > self._budget_tokens:
            return False
        self._budget_tokens -= tokens
        return True

    def _earn(self, tokens: int) -> None:
        self._budget_tokens = min(self._budget_tokens + _SHARE * tokens, _MOST_SAVED_TOKENS)
