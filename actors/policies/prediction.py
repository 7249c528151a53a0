"""How many tokens a request will produce: what is reserved before anybody knows.

Pure. Used by `actors.gateway`. Per tenant, since learned predictors are weak out of domain (scaling.md), and bounded
by what the request allows.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from actors.policies.quantile import Quantile

_SMOOTHING = 0.2
_DEFAULT_TOKENS = 128.0  # until a tenant was seen
_MOST_TENANTS = 10_000
_SHARE = 0.9  # of a tenant's answers that are no longer than predicted


@dataclass(slots=True)
class _Tenant:
    mean_tokens: float
    high: Quantile = field(default_factory=lambda: Quantile(_SHARE))


class OutputPredictor:
    """Output tokens per choice, by tenant: the 90th percentile for engine memory, the mean for limits."""

    def __init__(self) -> None:
        self._tenants: OrderedDict[str, _Tenant] = OrderedDict()

    def predict(self, tenant: str, max_tokens: int | None) -> int:
        """Output tokens that one choice in ten exceeds, at least 1 and at most `max_tokens`."""
        known = self._tenants.get(tenant)
        return _bounded(known.high.value if known is not None else _DEFAULT_TOKENS, max_tokens)

    def expect(self, tenant: str, max_tokens: int | None) -> int:
        """Mean output tokens of one choice, at least 1 and at most `max_tokens`."""
        known = self._tenants.get(tenant)
        return _bounded(known.mean_tokens if known is not None else _DEFAULT_TOKENS, max_tokens)

    def observe(self, tenant: str, output_tokens: int) -> None:
        """Learn from a finished choice."""
        tokens = float(max(output_tokens, 1))
        known = self._tenants.setdefault(tenant, _Tenant(tokens))
        known.mean_tokens += _SMOOTHING * (tokens - known.mean_tokens)
        known.high.observe(tokens)
        self._tenants.move_to_end(tenant)
        if len(self._tenants) > _MOST_TENANTS:
            self._tenants.popitem(last=False)


def _bounded(tokens: float, max_tokens: int | None) -> int:
    return max(1, round(tokens if max_tokens is None else min(tokens, max_tokens)))
