"""Keeps an engine's numbers at hand: vLLM reports every iteration here, `VllmEngine.stats` reads them.

Imported only once vLLM is loaded (by `vllm_launch`). It polls nothing and sends no call to the engine.
"""

from __future__ import annotations

import time
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase

from actors.engines.protocol import EngineStats


class EngineCounters(StatLoggerBase):
    """What the engine said last and in sum; handed to vLLM as its stat logger (`factory`)."""

    def __init__(self) -> None:
        self.running = 0
        self.kv_usage = 0.0
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.preemptions = 0
        self.prefix_hit_tokens = 0
        self.last_step = time.monotonic()

    def factory(self, vllm_config: Any, engine_index: int = 0) -> EngineCounters:  # noqa: ARG002  vLLM's signature
        """What vLLM calls to get its logger: this object."""
        return self

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,  # noqa: ARG002  vLLM's signature
        engine_idx: int = 0,  # noqa: ARG002  the same
    ) -> None:
        """Take over one iteration; either part may be missing."""
        self.last_step = time.monotonic()
        if scheduler_stats is not None:
            self.running = scheduler_stats.num_running_reqs
            self.kv_usage = scheduler_stats.kv_cache_usage
        if iteration_stats is not None:
            self.output_tokens += iteration_stats.num_generation_tokens
            self.preemptions += iteration_stats.num_preempted_reqs
            self.prompt_tokens += iteration_stats.prompt_token_stats.total
            self.prefix_hit_tokens += iteration_stats.prompt_token_stats.cached_tokens

    def snapshot(self, accepted: int) -> EngineStats:
        """The numbers as the protocol wants them.

        Args:
            accepted: sequences that `generate` has taken and not ended; what does not run of them, waits.
        """
        return EngineStats(
            running=self.running,
            waiting=max(0, accepted - self.running),
            kv_usage=self.kv_usage,
            prompt_tokens_total=self.prompt_tokens,
            output_tokens_total=self.output_tokens,
            preemptions_total=self.preemptions,
            prefix_hit_tokens_total=self.prefix_hit_tokens,
        )

    def log_engine_initialized(self) -> None:
        """Nothing to log: the replica says when it is ready."""
