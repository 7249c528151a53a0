"""The scripted engine with memory on a card: it stands in for vLLM where only its use of memory matters."""

from __future__ import annotations

from actors.engines.gpu_start import Plan
from actors.engines.scripted import ScriptedConfig, ScriptedEngine
from actors.engines.scripted_faults import FaultKind, ScriptedFault
from actors.errors import EngineFailed
from actors.policies.gpu_memory import MIB
from actors.types import ModelCard
from tests.gpu.cards import Memory, OutOfMemory

KV_BYTES_PER_TOKEN = MIB // 8
_CONTEXT_TOKENS = 2048


class CardEngine(ScriptedEngine):
    """Takes weights, working memory and the planned KV cache of a card.

    Args:
        memory: the card.
        name: of its allocations.
        weights_bytes: weights and working memory.
        plan: the KV cache.
    """

    def __init__(self, memory: Memory, name: str, weights_bytes: int, plan: Plan) -> None:
        tokens = max(plan.kv_cache_bytes // KV_BYTES_PER_TOKEN, _CONTEXT_TOKENS)
        config = ScriptedConfig(
            context_tokens=_CONTEXT_TOKENS,
            kv_tokens=tokens,
            max_sequences=max(int(64 * plan.batch_share), 1),
            itl_base_s=0.001,
            itl_per_sequence_s=0,
            prefill_tokens_per_s=None,
        )
        super().__init__(name, config)
        self._memory = memory
        self._name = name
        self._parts = {"weights": weights_bytes, "kv": plan.kv_cache_bytes}

    async def start(self) -> ModelCard:
        """Load: whoever takes more than there is dies."""
        card = await super().start()
        self._take()
        return card

    async def stop(self) -> None:
        """Give everything back."""
        await super().stop()
        self._give_back()

    async def sleep(self) -> None:
        """Level 1: nothing stays on the card."""
        self._give_back()

    async def wake(self) -> None:
        """Take it all again."""
        self._take()

    def run_out_of_memory(self) -> None:
        """The engine's process dies, and the driver takes its memory back."""
        self.inject(ScriptedFault(kind=FaultKind.OUT_OF_MEMORY))
        self._give_back()

    def _take(self) -> None:
        try:
            for part, size in self._parts.items():
                self._memory.allocate(f"{self._name}:{part}", size)
        except OutOfMemory as error:
            self._give_back()
            raise EngineFailed(f"the engine ran out of memory: {error}") from error

    def _give_back(self) -> None:
        for part in self._parts:
            self._memory.free(f"{self._name}:{part}")
