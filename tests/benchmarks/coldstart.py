"""How long a request waits that finds no READY engine. `python -m tests.benchmarks.coldstart [--quick] [--json FILE]`.

COLD: a pool at zero in a real cluster, scripted engine (it loads nothing: what is measured is Serve's and Ray's part);
the request is held until its replica runs. ASLEEP: an engine on a pretended card that has lent its memory to a
neighbour wakes for a request. READY beside both. Without `--quick` also vLLM on this machine's CPU with SmolLM2-135M:
the start of its engine, which is what a COLD replica adds.
"""

import asyncio
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from actors.engines.model_files import resolve_model
from actors.engines.vllm import VllmConfig, VllmEngine
from app.config import ModelArgs
from tests.benchmarks.gpu import asleep
from tests.benchmarks.report import Row, parser, publish
from tests.conftest import System, app_of, config_of, running_system
from tests.gpu.cards import FileCard

MODEL = "scripted"
_TO_ZERO_S = 3


def config() -> dict[str, Any]:
    """configs/scripted.yaml with a pool that goes to zero when it is idle."""
    base = config_of("scripted", auth={"mode": "open"}, announce_url=None)
    model = app_of(base, "build_model")
    quick = {"metrics_interval_s": 0.2, "look_back_period_s": 1, "upscale_delay_s": 0, "downscale_delay_s": 0}
    scaling = {"smoothing_s": 1, "hold_s": 1, "to_zero_s": _TO_ZERO_S}
    model["autoscaling_policy"] = {
        "policy_function": "app.scaling:QueuePolicy",
        "policy_kwargs": {"LLMReplica": scaling},
    }
    pool = {"min_replicas": 0, "max_replicas": 1, "initial_replicas": 0}
    queue = {"min_replicas": 1, "max_replicas": 1}
    model["deployments"] = [
        {"name": "BatchingQueue", "autoscaling_config": queue | quick},
        {"name": "LLMReplica", "autoscaling_config": pool | quick},
    ]
    return base


async def first_token_s(system: System) -> float:
    """One streamed request: until its first token."""
    async with system.client() as client:
        began = time.perf_counter()
        stream = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "one two"}], stream=True
        )
        async for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                return time.perf_counter() - began
    raise AssertionError("no token came")


def replicas(system: System) -> int:
    """Of the pool, in any state."""
    return len(system.status()[MODEL]["deployments"]["LLMReplica"]["replicas"])


async def from_zero(times: int) -> list[Row]:
    """Requests that find no replica at all, and requests right behind them."""
    cold, ready = [], []
    with running_system(config()) as system:
        for _ in range(times):
            while await asyncio.to_thread(replicas, system):
                await asyncio.sleep(0.5)
            cold.append(await first_token_s(system))
            ready += [await first_token_s(system) for _ in range(3)]
    return [
        Row(
            name="cold_first_token_p50",
            value=statistics.median(cold),
            unit="s",
            baseline="READY",
            baseline_value=statistics.median(ready),
        ),
        Row(name="cold_first_token_worst", value=max(cold), unit="s"),
    ]


async def vllm_start() -> list[Row]:
    """vLLM's engine on this machine's CPU, its files prepared before."""
    args = ModelArgs.model_validate(app_of(config_of("local"), "build_model")["args"])
    engine_config: VllmConfig | None = args.engine.vllm
    assert engine_config is not None
    cache_dir = args.cache_dir.expanduser()
    await asyncio.to_thread(resolve_model, engine_config.model, cache_dir)
    engine = VllmEngine(args.model, engine_config, cache_dir)
    began = time.perf_counter()
    await engine.start()
    took_s = time.perf_counter() - began
    await engine.stop()
    return [Row(name="vllm_cpu_engine_start", value=took_s, unit="s")]


def main() -> None:
    """Measure and print."""
    options = parser(__doc__).parse_args()
    rows = asyncio.run(from_zero(1 if options.quick else 5))
    with tempfile.TemporaryDirectory() as folder:
        rows += asyncio.run(asleep(FileCard(Path(folder) / "card"), 5 if options.quick else 20))
    if not options.quick:
        rows += asyncio.run(vllm_start())
    publish("Starts: COLD on the scripted engine, ASLEEP on a pretended card", rows, options.json)


if __name__ == "__main__":
    main()
