"""Processes that start engines on one card at the same moment, round after round."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from actors.engines.gpu_share import SharedCardEngine
from actors.engines.gpu_start import Plan, ShareConfig
from actors.errors import EngineFailed
from actors.policies.gpu_memory import MIB
from tests.gpu.card_engine import CardEngine
from tests.gpu.cards import CudaCard, FileCard

WEIGHTS_BYTES = 2 << 30
_ROUND_S = 60
_LOAD_S = 0.02  # of the weights, and of a profiling run


@dataclass(frozen=True, kw_only=True)
class Told:
    """What one process says about one round."""

    name: str
    round: int
    ready: bool
    kv_error: float  # of the planned KV cache, relative to what the share leaves
    start_s: float
    reason: str  # why it is not ready


def start_in_rounds(folder: Path, *, rounds: int, shares: int, num_gpus: float, real: bool) -> list[Told]:
    """Start `shares` processes with `num_gpus` each, `rounds` times, all at once."""
    return _in_rounds(_run, folder, rounds=rounds, shares=shares, num_gpus=num_gpus, real=real)


def profile_in_rounds(folder: Path, *, rounds: int, shares: int, num_gpus: float, real: bool) -> list[Told]:
    """The same with engines that size themselves by what the card lost while they started, as vLLM does alone."""
    return _in_rounds(_run_profiling, folder, rounds=rounds, shares=shares, num_gpus=num_gpus, real=real)


def _in_rounds(
    target: Callable[..., None], folder: Path, *, rounds: int, shares: int, num_gpus: float, real: bool
) -> list[Told]:
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(shares), context.Queue()
    processes = [
        context.Process(target=target, args=(folder, f"engine-{n}", rounds, num_gpus, barrier, queue, real))
        for n in range(shares)
    ]
    for process in processes:
        process.start()
    told = [queue.get(timeout=_ROUND_S * 2) for _ in range(rounds * shares)]
    for process in processes:
        process.join()
    return told


def _run_profiling(  # noqa: PLR0917  as below
    folder: Path, name: str, rounds: int, num_gpus: float, barrier: Barrier, queue: Any, real: bool
) -> None:
    memory = CudaCard() if real else FileCard(folder / "card")
    card = memory.mine()
    budget = num_gpus * card.usable_bytes
    for number in range(rounds):
        barrier.wait(_ROUND_S)
        began = time.monotonic()
        free = card.total_bytes - memory.used_bytes(card)
        memory.allocate(f"{name}:weights", WEIGHTS_BYTES)
        time.sleep(_LOAD_S)
        kv = budget - (free - (card.total_bytes - memory.used_bytes(card)))
        left = budget - WEIGHTS_BYTES
        ready = kv >= left / 2
        told = Told(
            name=name,
            round=number,
            ready=ready,
            kv_error=abs(kv - left) / left,
            start_s=time.monotonic() - began,
            reason="" if ready else "less than half of its KV cache",
        )
        queue.put(told)
        barrier.wait(_ROUND_S)
        memory.free(f"{name}:weights")
        barrier.wait(_ROUND_S)


def _run(  # noqa: PLR0917  one argument per thing that crosses the process border
    folder: Path, name: str, rounds: int, num_gpus: float, barrier: Barrier, queue: Any, real: bool
) -> None:
    memory = CudaCard() if real else FileCard(folder / "card")
    config = ShareConfig(folder=folder / "node", least_kv_bytes=64 * MIB, start_timeout_s=_ROUND_S)
    plans: list[Plan] = []

    def make(plan: Plan) -> CardEngine:
        plans.append(plan)
        return CardEngine(memory, name, WEIGHTS_BYTES, plan)

    engine = SharedCardEngine(
        owner=name, num_gpus=num_gpus, make=make, key=f"{WEIGHTS_BYTES}", cards=memory, config=config
    )
    asyncio.run(_rounds(engine, rounds, barrier, lambda: plans[-1], queue.put))


async def _rounds(
    engine: SharedCardEngine,
    rounds: int,
    barrier: Barrier,
    planned: Callable[[], Plan],
    tell: Callable[[Told], None],
) -> None:
    for number in range(rounds):
        await asyncio.to_thread(barrier.wait, _ROUND_S)
        began = time.monotonic()
        try:
            await engine.start()
            reason = ""
        except EngineFailed as failure:
            reason = failure.message
        took_s = time.monotonic() - began
        left = engine._num_gpus * engine._cards.mine().usable_bytes - WEIGHTS_BYTES
        error = abs(planned().kv_cache_bytes - left) / left if not reason else 1.0
        tell(
            Told(
                name=engine._owner,
                round=number,
                ready=not reason,
                kv_error=error,
                start_s=took_s,
                reason=reason,
            )
        )
        await asyncio.to_thread(barrier.wait, _ROUND_S)  # all are ready at once
        await engine.stop()
        await asyncio.to_thread(barrier.wait, _ROUND_S)  # and all are gone
