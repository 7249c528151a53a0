"""Which engine a model runs on: the `engine` of a model's arguments, made into an `LLMEngine`.

Read by `app.config`; `LLMReplica` builds what it says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from actors.engines.gpu_cards import NvmlCards
from actors.engines.gpu_share import SharedCardEngine
from actors.engines.gpu_start import Plan, ShareConfig
from actors.engines.protocol import LLMEngine
from actors.engines.scripted import ScriptedConfig, ScriptedEngine
from actors.engines.vllm import VllmConfig, VllmEngine

# vLLM looks at start whether so much of the card is free, whoever uses the rest; the ledger knows better.
_ANY_FREE = 0.01


class EngineChoice(BaseModel):
    """Which engine serves the model: exactly one of `scripted` and `vllm` is set."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scripted: ScriptedConfig | None = Field(default=None, description="The deterministic engine for tests.")
    vllm: VllmConfig | None = Field(default=None, description="vLLM, in process, on GPU or CPU.")
    share: ShareConfig | None = Field(
        default=None,
        description="vLLM keeps to the share of a card that the replica's num_gpus (at most 1) is, in bytes, and "
        "sleeps while others need it; null: it has its GPUs to itself.",
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> EngineChoice:
        if (self.scripted is None) == (self.vllm is None):
            raise ValueError("name exactly one engine: scripted or vllm")
        return self

    @model_validator(mode="after")
    def _a_share_decides_about_memory(self) -> EngineChoice:
        if self.share is None:
            return self
        if self.vllm is None:
            raise ValueError("share goes with vllm: the scripted engine uses no GPU")
        for name in ("kv_cache_memory_bytes", "gpu_memory_utilization"):
            if getattr(self.vllm, name) is not None:
                raise ValueError(f"vllm.{name} follows from num_gpus where there is a share: leave it out")
        if self.vllm.max_num_seqs is None:
            raise ValueError("share needs vllm.max_num_seqs: it is halved when the engine runs out of memory")
        if self.vllm.tensor_parallel_size > 1:
            raise ValueError("a share is of one GPU: tensor_parallel_size must be 1")
        return self

    def build(self, model: str, cache_dir: Path, owner: str, num_gpus: float) -> LLMEngine:
        """Make the engine; it is not started.

        Args:
            model: public name of the model.
            cache_dir: where prepared weights are kept.
            owner: the replica, for its lease of a share.
            num_gpus: what the replica was given of a card.

        Raises:
            EngineFailed: a share is asked for and the GPU's driver does not answer.
        """
        if self.scripted is not None:
            return ScriptedEngine(model, self.scripted)
        vllm = self.vllm
        if vllm is None:
            raise AssertionError("validated above")
        if self.share is None:
            return VllmEngine(model, vllm, cache_dir)
        return SharedCardEngine(
            owner=owner,
            num_gpus=num_gpus,
            make=lambda plan: VllmEngine(model, sized(vllm, plan), cache_dir),
            key=vllm.model_dump_json(),
            cards=NvmlCards(),
            config=self.share,
        )


def sized(config: VllmConfig, plan: Plan) -> VllmConfig:
    """A vLLM that profiles nothing: its KV cache is what the plan says."""
    update: dict[str, Any] = {
        "kv_cache_memory_bytes": plan.kv_cache_bytes,
        "gpu_memory_utilization": _ANY_FREE,
        "engine_args": {**config.engine_args, "enable_sleep_mode": True},
    }
    if config.max_num_seqs is not None:
        update["max_num_seqs"] = max(int(config.max_num_seqs * plan.batch_share), 1)
    return config.model_copy(update=update)
