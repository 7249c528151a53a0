"""Starts and ends vLLM's `AsyncLLM` for `VllmEngine`: environment, engine arguments, the processes.

Everything here blocks for seconds and runs in a thread. vLLM is imported nowhere before `launch`, because it
reads much of its environment at import.
"""

from __future__ import annotations

import dataclasses
import difflib
import gc
import multiprocessing
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.engines.protocol import EngineCapacity
from actors.errors import EngineFailed

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from actors.engines.model_files import ModelFiles
    from actors.engines.vllm import VllmConfig
    from actors.engines.vllm_stats import EngineCounters

_CPU_KV_CACHE_BYTES = 1 << 30  # the default where no GPU memory bounds it
_STOP_GRACE_S = 1.0  # until its processes are killed: their own teardown takes longer and saves nothing
_KILL_WAIT_S = 10.0  # for the kernel to take back a killed process's memory

# Engine arguments that are not to be set by name: ours to decide, and those that would load code or pickles.
_RESERVED = frozenset(
    {
        "model", "tokenizer", "revision", "tokenizer_revision", "code_revision", "trust_remote_code", "load_format",
        "disable_log_stats", "enable_log_requests", "generation_config", "structured_outputs_config", "hf_token",
        "use_tqdm_on_load",
    }
)  # fmt: skip


def prepare_environment(config: VllmConfig) -> None:
    """Set what vLLM reads from the environment; before its first import in this process."""
    # Its warnings quote schemas and messages, which belong to the users.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("LLGUIDANCE_LOG_LEVEL", "0")
    os.environ.update({"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"})
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override kv_cache_memory_bytes
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    os.environ["OMP_NUM_THREADS"] = str(config.omp_threads)


@dataclass(frozen=True, kw_only=True, slots=True)
class Launched:
    """A running vLLM."""

    llm: Any  # the AsyncLLM, bound to no event loop before its first request
    counters: EngineCounters  # what it reports to
    processes: tuple[BaseProcess, ...]  # its children


def launch(config: VllmConfig, files: ModelFiles) -> Launched:
    """Start vLLM; returns when the model is loaded.

    Raises:
        EngineFailed: vLLM is not installed, bad arguments, or the model cannot be loaded.
    """
    try:
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        from actors.engines.vllm_stats import EngineCounters
    except ImportError as error:
        raise EngineFailed(
            f"vLLM cannot be imported ({error}); `pip install shoal[local]` brings it for CPUs, shoal[gpu] for GPUs"
        ) from error
    on_cpu = current_platform.is_cpu()
    if on_cpu and config.enforce_eager:
        # vLLM compiles parts of its sampler when first used even then: seconds of standstill, and a C++ compiler.
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    if on_cpu and config.tensor_parallel_size == 1:
        # On CPUs vLLM puts a worker process behind the engine's, both polling shared memory. Without it: half the
        # CPU time per token, one Python process less, a quarter off the start. (The engine itself stays a process
        # of its own, whatever this variable's name says.)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    counters = EngineCounters()
    before = set(multiprocessing.active_children())
    try:
        arguments = _engine_args(config, files, on_cpu=on_cpu)
        llm = AsyncLLM.from_engine_args(arguments, stat_loggers=[counters.factory])
    except EngineFailed:
        raise
    except Exception as error:  # whatever a model, its files or the device can do to a start
        raise EngineFailed(f"the model {config.model} cannot be loaded: {error}") from error
    # Importing vLLM leaves a million objects, which the event loop's garbage collector need not scan again.
    gc.collect()
    gc.freeze()
    # `vllm_sampling` checks every request's schema, off the event loop; vLLM would do it again, on it.
    llm.input_processor.structured_outputs_config = None
    processes = tuple(set(multiprocessing.active_children()) - before)
    return Launched(llm=llm, counters=counters, processes=processes)


def shutdown(launched: Launched) -> None:
    """End the engine and wait until its processes are gone; safe to call twice."""
    launched.llm.shutdown(timeout=_STOP_GRACE_S)
    for process in launched.processes:
        process.join(_KILL_WAIT_S)


def tool_parser(llm: Any, name: str | None) -> Any:
    """Find vLLM's parser class for tool calls in auto mode; None without a name.

    Raises:
        EngineFailed: there is none of this name, or it does not go with the model's tokenizer.
    """
    if name is None:
        return None
    from vllm.parser import ParserManager
    from vllm.tool_parsers import ToolParserManager

    known = ToolParserManager.list_registered()
    if name not in known:
        raise EngineFailed(f"tool_parser {name!r} is unknown; allowed are {', '.join(known)}")
    try:
        return ParserManager.get_parser(
            tool_parser_name=name,
            enable_auto_tools=True,
            tokenizer=llm.get_tokenizer(),
            model_name=llm.model_config.model,
        )
    except Exception as error:  # a parser checks the tokenizer in its own way
        raise EngineFailed(f"tool_parser {name!r} does not fit this model: {error}") from error


def capacity(llm: Any) -> EngineCapacity:
    """What vLLM can run at once, as it sized itself."""
    cache = llm.vllm_config.cache_config
    return EngineCapacity(
        max_sequences=llm.vllm_config.scheduler_config.max_num_seqs,
        kv_tokens=cache.num_gpu_blocks * cache.block_size,
    )


def identity(llm: Any, files: ModelFiles) -> tuple[str, str]:
    """The loaded model's revision, and the folder of its tokenizer.json (empty when not found on this machine)."""
    if files.tokenizer:
        return files.revision, files.tokenizer
    from huggingface_hub import try_to_load_from_cache

    commit = getattr(llm.model_config.hf_config, "_commit_hash", None) or files.revision
    found = try_to_load_from_cache(files.model, "tokenizer.json", revision=commit or None)
    return commit, str(Path(found).parent) if isinstance(found, str) else ""


def _engine_args(config: VllmConfig, files: ModelFiles, *, on_cpu: bool) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs

    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    check_names(config.engine_args, set(type(config).model_fields), known)
    wanted = {
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "kv_cache_memory_bytes": config.kv_cache_memory_bytes or (_CPU_KV_CACHE_BYTES if on_cpu else None),
    }
    return AsyncEngineArgs(
        model=files.model,
        revision=files.hub_revision,
        tokenizer_revision=files.hub_revision,
        trust_remote_code=False,
        load_format="safetensors",
        dtype=config.dtype,
        enforce_eager=config.enforce_eager,
        tensor_parallel_size=config.tensor_parallel_size,
        enable_prefix_caching=config.enable_prefix_caching,
        disable_log_stats=True,  # vLLM's own loggers; ours is passed beside
        use_tqdm_on_load=False,
        # One backend, chosen once: vLLM keeps the first request's for the process's life. This one names what of
        # a schema it cannot do and compiles lazily, where xgrammar burns all cores on a large enum.
        structured_outputs_config={"backend": "guidance", "disable_any_whitespace": True},
        **{name: value for name, value in wanted.items() if value is not None},
        **config.engine_args,
    )


def check_names(engine_args: dict[str, Any], ours: set[str], known: set[str]) -> None:
    """Refuse engine arguments that vLLM does not know, that the config has itself, or that are not to be set.

    Args:
        engine_args: from the config.
        ours: names of the config's own fields.
        known: names of vLLM's arguments.

    Raises:
        EngineFailed: naming the argument.
    """
    for name in engine_args:
        if name in ours & known:
            raise EngineFailed(f"engine_args.{name}: set it as {name} of the engine's config")
        if name in _RESERVED:
            raise EngineFailed(f"engine_args.{name} is not allowed")
        if name not in known:
            close = difflib.get_close_matches(name, known)
            hint = f"; close: {', '.join(close)}" if close else ""
            raise EngineFailed(f"engine_args.{name} is no argument of vLLM's AsyncEngineArgs{hint}")
