"""The scripted engine: a real engine in every respect but the model.

Serves tests, simulation and benchmarks behind `LLMEngine`. This file owns its config and a request's way through;
`scripted_accept` takes it in, `scripted_text` says what is answered, `scripted_script` lays it out in tokens,
`scripted_batch` and `scripted_loop` run it at the pace of `service_curve`, `scripted_faults` breaks it on demand.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from actors.engines.progress import progress_of
from actors.engines.protocol import EngineCapacity, EngineStats
from actors.engines.scripted_accept import accept
from actors.engines.scripted_batch import Batch
from actors.engines.scripted_faults import ScriptedFault, directive
from actors.engines.scripted_loop import StepLoop
from actors.engines.scripted_text import Style, last_user_text
from actors.engines.service_curve import ServiceCurve
from actors.engines.tokens import SCRIPTED
from actors.errors import Conflict, EngineFailed
from actors.types import GenerationRequest, ModelCard, TokenDelta

TEMPLATE_OVERHEAD_TOKENS = 4  # per message and tool, as its chat template would add


class ScriptedConfig(BaseModel):
    """What the scripted engine can do, how fast it is and how it breaks."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    context_tokens: int = Field(default=8192, ge=16, description="Prompt and output together, per sequence.")
    max_sequences: int = Field(default=64, ge=1, description="Sequences in the batch at once.")
    kv_tokens: int = Field(default=524_288, ge=16, description="Tokens of KV cache over all sequences.")
    itl_base_s: float = Field(default=0.0065, ge=0, description="Step time of an empty batch.")
    itl_per_sequence_s: float = Field(default=0.000062, ge=0, description="Step time each sequence adds.")
    prefill_tokens_per_s: float | None = Field(
        default=25_000.0, gt=0, description="Speed of prefill; null: prefill takes no time."
    )
    fixed_service_s: float | None = Field(
        default=None,
        ge=0,
        description="Each sequence takes exactly this long and comes in one delta; the curve is ignored. 0: no "
        "time at all.",
    )
    start_up_s: float = Field(default=0.0, ge=0, description="How long `start` takes.")
    style: Style = Field(default="echo", description="Free text repeats the last user message or rewords it.")
    output_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Length of free text; null: the text's own. Stop and max_tokens still end it.",
    )
    hang_bound_s: float = Field(default=5.0, gt=0, description="A step so late fails the health check.")
    faults: tuple[ScriptedFault, ...] = Field(default=(), description="Armed at the start.")
    allow_directives: bool = Field(default=False, description="Obey [[shoal:...]] faults in user messages.")

    @model_validator(mode="after")
    def _one_full_sequence_fits(self) -> Self:
        if self.kv_tokens < self.context_tokens:
            raise ValueError(
                f"kv_tokens ({self.kv_tokens}) must be at least context_tokens ({self.context_tokens})"
            )
        return self

    @property
    def curve(self) -> ServiceCurve:
        """The timing part."""
        return ServiceCurve(
            itl_base_s=self.itl_base_s,
            itl_per_sequence_s=self.itl_per_sequence_s,
            prefill_tokens_per_s=self.prefill_tokens_per_s,
            fixed_service_s=self.fixed_service_s,
        )


class ScriptedEngine:
    """An `LLMEngine` whose answers and timing are known in advance.

    Args:
        model: the name it is served under.
        config: see `ScriptedConfig`.
    """

    def __init__(self, model: str, config: ScriptedConfig | None = None) -> None:
        self.config = config or ScriptedConfig()
        self._card = ModelCard(
            name=model,
            context_tokens=self.config.context_tokens,
            tokenizer=SCRIPTED,
            template_overhead_tokens=TEMPLATE_OVERHEAD_TOKENS,
            revision=f"scripted-{self.config.style}-{self.config.output_tokens or 'natural'}",
        )
        self._capacity = EngineCapacity(
            max_sequences=self.config.max_sequences, kv_tokens=self.config.kv_tokens
        )
        self._batch = Batch(self._capacity)
        self._loop: StepLoop | None = None

    async def start(self) -> ModelCard:
        """Take `start_up_s`, then serve; a stopped or dead engine may be started again."""
        await self.stop()
        await asyncio.sleep(self.config.start_up_s)
        self._batch = Batch(self._capacity)
        self._loop = StepLoop(self._batch, self.config.curve, self.config.hang_bound_s)
        for fault in self.config.faults:
            self._loop.inject(fault)
        return self._card

    @property
    def capacity(self) -> EngineCapacity:
        """From the config."""
        return self._capacity

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        """Run one request; see `LLMEngine.generate`. An aborted request just ends, without usage.

        Every kind of answer goes on exactly behind `request.progress`. What it holds is computed again with the
        prompt; a fault that the request asks for has struck before and does not again.

        Raises:
            InvalidRequest: max_tokens or n below 1, a tool, schema or token id that cannot be served.
            ContextLengthExceeded: before anything of the engine is taken.
            Conflict: a request of this id is running.
            CannotResume: this engine's answer does not begin with `request.progress`.
            EngineFailed: the engine is dead, or died on the way.
        """
        loop = self._running()
        if loop.stream(request.request_id) is not None:
            raise Conflict(f"request {request.request_id} is running on this engine already")
        stream, sequences = accept(request, self._card, self.config)
        if self.config.allow_directives and not progress_of(request):
            fault = directive(last_user_text(request.messages or ()))
            if fault is not None:
                loop.inject(fault)
        loop.submit(stream, sequences)
        try:
            while True:
                while stream.deltas:
                    yield stream.deltas.popleft()
                if stream.ended:
                    break
                await stream.arrival()
            if stream.failure is not None:
                raise EngineFailed(stream.failure)
        finally:
            loop.drop(stream)

    async def abort(self, request_id: str) -> None:
        """Stop a request and free its slot at once; unknown ids are ignored."""
        stream = self._loop.stream(request_id) if self._loop else None
        if self._loop and stream:
            self._loop.drop(stream)

    def stats(self) -> EngineStats:
        """The current snapshot; totals count from the last start."""
        return self._batch.stats()

    async def check_health(self) -> None:
        """Return with the next step, or when an idle engine has answered.

        Raises:
            EngineFailed: it is dead, or made no progress for `hang_bound_s`.
        """
        await self._running().check_health()

    async def stop(self) -> None:
        """End it; running requests fail."""
        if self._loop is not None:
            await self._loop.stop()

    def inject(self, fault: ScriptedFault) -> None:
        """Break the engine, now or after so many tokens."""
        self._running().inject(fault)

    def clear_faults(self) -> None:
        """End a hang or a slowness and disarm what has not struck yet; a dead engine needs `start`."""
        self._running().clear_faults()

    def _running(self) -> StepLoop:
        if self._loop is None:
            raise EngineFailed("the engine is not started")
        if self._loop.failure is not None:
            raise EngineFailed(self._loop.failure)
        return self._loop
