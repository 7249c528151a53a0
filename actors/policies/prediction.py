"""How many tokens a request will produce: what the queue charges before anybody knows.

Pure. A moving average per tenant (learned predictors are weak out of domain, scaling.md), bounded by what the
request allows.
"""

from __future__ import annotations

from collections import OrderedDict

_SMOOTHING = 0.2
_DEFAULT_TOKENS = 128.0  # until a tenant was seen
_MOST_TENANTS = 10_000


class OutputPredictor:
    """Moving average of output tokens per choice, by tenant."""

    def __init__(self) -> None:
        self._mean_tokens: OrderedDict[str, float] = OrderedDict()

    def predict(self, tenant: str, max_tokens: int | None) -> int:
        """Expected output tokens of one choice, at least 1 and at most `max_tokens`."""
        mean = self._mean_tokens.get(tenant, _DEFAULT_TOKENS)
        return max(1, round(mean if max_tokens is None else min(mean, max_tokens)))

    def observe(self, tenant: str, output_tokens: int) -> None:
        """Learn from a finished choice."""
        before = self._mean_tokens.get(tenant)
        now = output_tokens if before is None else before + _SMOOTHING * (output_tokens - before)
        self._mean_tokens[tenant] = float(now)
        self._mean_tokens.move_to_end(tenant)
        if len(self._mean_tokens) > _MOST_TENANTS:
            self._mean_tokens.popitem(last=False)
