"""How long an engine takes: a pure model of continuous batching.

The scripted engine paces itself by it, the simulator and the autoscaling benchmarks predict with it. It knows
no clock and no asyncio: seconds in, seconds out.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceCurve:
    """ITL(b) = base + slope * b, with prefill on top.

    The defaults fit vLLM with an 8B model on an H100 (ITL(b) = 6.5 + 0.062 b ms).
    """

    itl_base_s: float = 0.0065  # of a step with an empty batch
    itl_per_sequence_s: float = 0.000062  # added by each running sequence
    prefill_tokens_per_s: float | None = 25_000.0  # None: prefill costs nothing
    fixed_service_s: float | None = None  # every request takes exactly this long, whatever its tokens

    def itl_s(self, running: int) -> float:
        """Inter-token latency with `running` sequences in the batch."""
        return self.itl_base_s + self.itl_per_sequence_s * running

    def prefill_s(self, prompt_tokens: int) -> float:
        """Time that prefilling `prompt_tokens` adds to a step."""
        return prompt_tokens / self.prefill_tokens_per_s if self.prefill_tokens_per_s else 0.0

    def step_s(self, running: int, prefill_tokens: int = 0) -> float:
        """One engine step: a token for each of `running` sequences, and the prompts that were admitted."""
        return self.itl_s(running) + self.prefill_s(prefill_tokens)

    def request_s(self, prompt_tokens: int, output_tokens: int, running: int) -> float:
        """A whole request in a batch that holds `running` sequences all the time, itself included.

        Its prompt is prefilled in its first step, which already gives its first token.
        """
        if self.fixed_service_s is not None:
            return self.fixed_service_s
        return self.prefill_s(prompt_tokens) + output_tokens * self.itl_s(running)
