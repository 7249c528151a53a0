"""Shares of a GPU: engines started together, asleep, and out of memory. `python -m tests.benchmarks.gpu`.

Runs on a pretended card in a file (`tests.gpu.cards.FileCard`), or with `--real` on the GPU of this machine with torch
allocations in vLLM's place. The baseline of starting together is what vLLM does by itself: each engine takes what it
used while it started, neighbours' growth included, off its share (vllm#55827).
"""

import asyncio
import itertools
import statistics
import tempfile
import time
from pathlib import Path

from actors.engines.gpu_ledger import GpuLedger
from actors.engines.gpu_share import SharedCardEngine
from actors.engines.gpu_start import Plan, ShareConfig
from actors.errors import EngineFailed
from actors.policies.gpu_memory import MIB
from actors.types import GenerationRequest, Message
from tests.benchmarks.report import Row, parser, publish
from tests.gpu.card_engine import CardEngine
from tests.gpu.cards import CudaCard, FileCard, Memory
from tests.gpu.starters import WEIGHTS_BYTES, profile_in_rounds, start_in_rounds

SHARES, SHARE = 4, 0.24


def started_together(rounds: int, *, real: bool) -> list[Row]:
    """How many rounds have all four ready, and how far their KV caches are from plan."""
    with tempfile.TemporaryDirectory() as folder:
        told = start_in_rounds(Path(folder), rounds=rounds, shares=SHARES, num_gpus=SHARE, real=real)
    with tempfile.TemporaryDirectory() as folder:
        naive = profile_in_rounds(Path(folder), rounds=rounds, shares=SHARES, num_gpus=SHARE, real=real)
    failed, naive_failed = ({t.round for t in each if not t.ready} for each in (told, naive))
    worst, naive_worst = (max(t.kv_error for t in each) for each in (told, naive))
    own = "profiling while others start"
    return [
        Row(
            name=f"4x{SHARE:g}_rounds_all_ready",
            value=100 * (1 - len(failed) / rounds),
            unit="%",
            baseline=own,
            baseline_value=100 * (1 - len(naive_failed) / rounds),
        ),
        Row(
            name="kv_error_worst",
            value=100 * worst,
            unit="% of plan",
            baseline=own,
            baseline_value=100 * naive_worst,
        ),
        Row(name="four_starts_p50", value=statistics.median(t.start_s for t in told), unit="s"),
    ]


class Models:
    """Engines on one card, in this process."""

    def __init__(self, memory: Memory, folder: Path) -> None:
        self._memory = memory
        self._folder = folder
        self.made: dict[str, CardEngine] = {}
        # Several engines in one process: what the driver says of it is no engine's own.
        memory.used_by = lambda *_: None  # type: ignore[method-assign]

    async def start(self, name: str, num_gpus: float) -> SharedCardEngine:
        """One engine, READY."""

        def make(plan: Plan) -> CardEngine:
            self.made[name] = CardEngine(self._memory, name, WEIGHTS_BYTES, plan)
            return self.made[name]

        engine = SharedCardEngine(
            owner=name,
            num_gpus=num_gpus,
            make=make,
            key=name,
            cards=self._memory,
            config=ShareConfig(folder=self._folder, least_kv_bytes=64 * MIB),
        )
        await engine.start()
        return engine


async def answer(engine: SharedCardEngine, name: str, words: int) -> list[float]:
    """Run one request; when each of its steps came, seconds from its beginning."""
    began = time.perf_counter()
    text = " ".join(f"{n:03}" for n in range(words))
    request = GenerationRequest(request_id=name, messages=(Message(role="user", content=text),))
    return [time.perf_counter() - began async for delta in engine.generate(request) if delta.token_ids]


async def asleep(memory: Memory, rounds: int) -> list[Row]:
    """Two models that do not fit together, asked by turns: each answer wakes one and puts the other to sleep."""
    with tempfile.TemporaryDirectory() as folder:
        models = Models(memory, Path(folder))
        first = await models.start("a", 0.6)
        card = memory.mine()
        GpuLedger(Path(folder)).ask_to_sleep(card, int(0.6 * card.usable_bytes), "b")
        while not first.asleep:
            await asyncio.sleep(0.01)
        second = await models.start("b", 0.6)
        turns = [engine for _ in range(rounds) for engine in (first, second)]
        woken = [(await answer(engine, f"{turn}", 2))[0] for turn, engine in enumerate(turns)]
        ready = [(await answer(second, f"r{turn}", 2))[0] for turn in range(rounds)]
        await first.stop()
        await second.stop()
    return [
        Row(
            name="first_token_of_one_asleep_p50",
            value=statistics.median(woken),
            unit="s",
            baseline="READY",
            baseline_value=statistics.median(ready),
        )
    ]


async def out_of_memory(memory: Memory, streams: int) -> list[Row]:
    """One engine dies of memory three times while its neighbour answers."""
    with tempfile.TemporaryDirectory() as folder:
        models = Models(memory, Path(folder))
        victim, neighbour = await models.start("a", 0.4), await models.start("b", 0.4)
        calm = await _gaps(neighbour, streams, "calm")
        disturbed = asyncio.create_task(_gaps(neighbour, streams, "disturbed"))
        began = time.perf_counter()
        models.made["a"].run_out_of_memory()
        try:
            await answer(victim, "dies", 10)
        except EngineFailed:
            await victim.recover()
        back_s = time.perf_counter() - began
        worse = await disturbed
        await victim.stop()
        await neighbour.stop()
    return [
        Row(name="victim_back", value=back_s, unit="s"),
        Row(
            name="neighbour_tpot_p99",
            value=1e3 * statistics.quantiles(worse, n=100)[98],
            unit="ms",
            baseline="undisturbed",
            baseline_value=1e3 * statistics.quantiles(calm, n=100)[98],
        ),
    ]


async def _gaps(engine: SharedCardEngine, streams: int, name: str) -> list[float]:
    times = await asyncio.gather(*(answer(engine, f"{name}{n}", 600) for n in range(streams)))
    return [b - a for each in times for a, b in itertools.pairwise(each)]


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument("--real", action="store_true", help="on the GPU of this machine")
    chosen = options.parse_args()
    rounds = 10 if chosen.real else (20 if chosen.quick else 100)
    rows = started_together(rounds, real=chosen.real)
    for measure, count in ((asleep, 5 if chosen.quick else 20), (out_of_memory, 8)):
        with tempfile.TemporaryDirectory() as folder:
            memory = CudaCard() if chosen.real else FileCard(Path(folder) / "card")
            rows += asyncio.run(measure(memory, count))
    where = "this machine's GPU" if chosen.real else "a pretended card of 80 GiB, scripted engines"
    publish(f"Shares of a GPU, on {where}; {rounds} rounds", rows, chosen.json)


if __name__ == "__main__":
    main()
