"""What arrives: a trace as arrays, from a file, a folder or a name.

Readers for each format live in `trace_files`; `episode` holds the built-in one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """Requests in order of arrival."""

    name: str
    arrive_s: Any  # float64, seconds from the beginning, in order
    prompt_tokens: Any  # int64
    output_tokens: Any  # int64, at least 1
    tenant: Any  # int64, 0 to tenants - 1
    tenants: int = 1
    duration_s: float = 0.0  # of the load; requests may end later

    def __post_init__(self) -> None:
        """Refuse a trace with nothing in it, or out of order."""
        if not len(self.arrive_s):
            raise InvalidRequest(f"the trace {self.name} holds no requests")
        if np.any(np.diff(self.arrive_s) < 0.0):
            raise InvalidRequest(f"the trace {self.name} is not in order of arrival")

    def __len__(self) -> int:
        return len(self.arrive_s)

    def rate_rps(self, window_s: float) -> Any:
        """Arrivals per second in windows."""
        edges = np.arange(0.0, self.duration_s + window_s, window_s)
        return np.histogram(self.arrive_s, edges)[0] / window_s


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Lengths where a trace has none: log-normal prompts, exponential answers (ServeGen, arXiv 2505.09999, 3.2)."""

    prompt_mean: float = 1000.0  # tokens
    prompt_sigma: float = 0.8  # of the logarithm
    output_mean: float = 300.0  # tokens
    most_tokens: int = 8192  # prompt and answer together; longer ones are cut

    def draw(self, count: int, rng: np.random.Generator) -> tuple[Any, Any]:
        """Prompt and output tokens of `count` requests."""
        mu = np.log(self.prompt_mean) - self.prompt_sigma**2 / 2.0
        prompt = np.clip(rng.lognormal(mu, self.prompt_sigma, count), 1, self.most_tokens // 2)
        output = np.clip(rng.exponential(self.output_mean, count), 1, self.most_tokens // 2)
        return prompt.astype(np.int64), np.ceil(output).astype(np.int64)
