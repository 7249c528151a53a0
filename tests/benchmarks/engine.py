"""Shoal on a real model beside vLLM's own OpenAI server and `ray.serve.llm`: same model, settings and load.

    python -m tests.benchmarks.engine [--quick] [--json FILE]

All servers run at once, since starting them takes longer than measuring; the engines of those that are not being
measured are stopped (SIGSTOP), since an idle vLLM still polls. Within a round every server gets the same prompts
in turn, starting with another one each round; figures are medians over rounds, ratios medians of the rounds' own.

Settings are equal as far as the peers allow: eager, one compute thread, the engine without vLLM's extra worker
process on CPUs (as Shoal runs it). `ray.serve.llm` insists on that process. `--quick` leaves `ray.serve.llm`
out: three engines do not start within its minute on two cores.
"""

import asyncio
import json
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import httpx

from actors.engines.model_files import resolve_model
from tests.benchmarks.engine_servers import (
    BARE,
    RAY,
    SHOAL,
    Server,
    bare,
    only,
    peer_packages,
    ray_serve_llm,
    shoal,
    shoal_config,
)
from tests.benchmarks.processes import cpu_by_role, memory_by_role
from tests.benchmarks.report import Row, parser, publish
from tests.conftest import app_of

STREAMS = (1, 8, 16)


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One server under one number of streams, in one round."""

    tokens_per_s: float
    ttft_ms: float  # median over requests
    tpot_ms: float
    cpu_ms_per_token: float  # of the server's whole process tree


@dataclass(frozen=True, kw_only=True)
class Load:
    """What every server is asked in one round."""

    tokens: int  # of output
    waves: dict[int, int]  # streams → requests of each stream
    long: bool = True  # prompts of about 150 tokens with the template, else 50

    def prompt(self, number: int) -> str:
        """A wish for a long story; unlike every other number's from the start, so that no prefix is shared."""
        topics = ("the sea", "a lighthouse", "an old clock", "the desert", "a town", "winter", "a bridge")
        wish = f"Request {number}. Write a long story about {topics[number % len(topics)]}."
        return wish + _MANNER if self.long else wish


_MANNER = (
    " You help a writer who collects short scenes for a book about travel and memory. Each scene has a place, a "
    "person and something that goes wrong, and it is told in plain words by somebody who was there. The book is "
    "read aloud in schools, so that sentences must be short and clear. Do not make lists, do not explain what you "
    "do, and do not stop early. Begin with what the storyteller sees in the morning from the kitchen window."
)
QUICK = Load(tokens=10, waves={1: 5, 8: 1, 16: 1}, long=False)
FULL = Load(tokens=32, waves={1: 6, 8: 2, 16: 2})


async def stream(
    http: httpx.AsyncClient, server: Server, number: int, load: Load
) -> tuple[float, float, int]:
    """One streamed chat: seconds to the first text, seconds to the last, tokens by the server's own count."""
    body = {
        "model": server.model,
        "messages": [{"role": "user", "content": load.prompt(number)}],
        "max_tokens": load.tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started = time.perf_counter()
    first = last = 0.0
    count = 0
    async with http.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if event.get("usage"):
                count = event["usage"]["completion_tokens"]
            if event["choices"] and event["choices"][0]["delta"].get("content"):
                last = time.perf_counter() - started
                first = first or last
    return first, last, count


async def measure(server: Server, streams: int, numbers: range, load: Load) -> Figures:
    """Closed loop: `streams` clients share the requests `numbers`."""
    waiting = iter(numbers)
    done: list[tuple[float, float, int]] = []
    limits = httpx.Limits(max_connections=streams)
    async with httpx.AsyncClient(timeout=300, limits=limits) as http:

        async def client() -> None:
            done.extend([await stream(http, server, number, load) for number in waiting])

        cpu, started = cpu_by_role(server.pid).total(), time.perf_counter()
        await asyncio.gather(*(client() for _ in range(streams)))
        wall, cpu = time.perf_counter() - started, cpu_by_role(server.pid).total() - cpu
    total = sum(count for *_, count in done)
    return Figures(
        tokens_per_s=total / wall,
        ttft_ms=1e3 * statistics.median(first for first, *_ in done),
        tpot_ms=1e3 * statistics.median((last - first) / max(1, count - 1) for first, last, count in done),
        cpu_ms_per_token=1e3 * cpu / total,
    )


def rounds(servers: list[Server], count: int, load: Load) -> dict[tuple[str, int], list[Figures]]:
    """Every server under every number of streams, `count` times."""
    found: dict[tuple[str, int], list[Figures]] = {}
    number = 0
    for turn in range(count):
        for streams in STREAMS:
            numbers = range(number, number := number + streams * load.waves[streams])
            for server in servers[turn % len(servers) :] + servers[: turn % len(servers)]:
                with only(server, servers):
                    figures = asyncio.run(measure(server, streams, numbers, load))
                found.setdefault((server.name, streams), []).append(figures)
    return found


def rows(found: dict[tuple[str, int], list[Figures]]) -> list[Row]:
    names = {name for name, _ in found}
    peers = [(BARE, "bare"), (RAY, "ray_serve_llm")]

    def median(name: str, streams: int, field: str) -> float:
        return statistics.median(getattr(figures, field) for figures in found[name, streams])

    def paired(name: str, streams: int) -> float:
        pairs = zip(found[SHOAL, streams], found[name, streams], strict=True)
        return statistics.median(ours.tokens_per_s / theirs.tokens_per_s for ours, theirs in pairs)

    out = [
        Row(
            name=f"tokens_per_s_over_{short}_c{n}",
            value=paired(peer, n),
            unit="ratio",
            baseline=peer,
            baseline_value=1.0,
        )
        for peer, short in peers
        if peer in names
        for n in STREAMS
    ]
    added = median(SHOAL, 1, "ttft_ms") - median(BARE, 1, "ttft_ms")
    out.append(
        Row(
            name="ttft_added_ms_c1",
            value=added,
            unit="ms",
            baseline=f"{BARE}, its TTFT",
            baseline_value=median(BARE, 1, "ttft_ms"),
        )
    )
    for field, unit in (
        ("tokens_per_s", "1/s"),
        ("ttft_ms", "ms"),
        ("tpot_ms", "ms"),
        ("cpu_ms_per_token", "ms"),
    ):
        for n in STREAMS:
            for peer, _ in peers:
                if peer in names:
                    out.append(
                        Row(
                            name=f"{field}_c{n}",
                            value=median(SHOAL, n, field),
                            unit=unit,
                            baseline=peer,
                            baseline_value=median(peer, n, field),
                        )
                    )
    return out


def main() -> None:
    chosen = parser(__doc__.partition("\n")[0]).parse_args()
    model = app_of(shoal_config(), "build_model")["args"]
    vllm = dict(model["engine"]["vllm"])
    folder = resolve_model(
        vllm.pop("model"), Path(model.get("cache_dir", "~/.shoal/models")).expanduser()
    ).model
    peers = [bare(folder, vllm)]
    if not chosen.quick:
        peer_packages()
        peers.append(ray_serve_llm(folder, vllm))
    began = time.perf_counter()
    with ExitStack() as stack, ThreadPoolExecutor(len(peers)) as pool:
        starting = [pool.submit(stack.enter_context, peer) for peer in peers]
        servers = [stack.enter_context(shoal())]  # its clean-up on Ctrl-C needs the main thread
        servers += [peer.result() for peer in starting]
        print(f"all servers ready after {time.perf_counter() - began:.0f} s", flush=True)
        load, count = (QUICK, 1) if chosen.quick else (FULL, 5)
        for server in servers:  # the first request opens connections and buses
            asyncio.run(measure(server, streams=2, numbers=range(-2, 0), load=replace(load, tokens=2)))
        found = rounds(servers, count, load)
        memory = {server.name: memory_by_role(server.pid).total() for server in servers}
    table = rows(found)
    for peer in servers[1:]:
        table.append(
            Row(
                name="memory_pss_mb",
                value=memory[SHOAL],
                unit="MB",
                baseline=peer.name,
                baseline_value=memory[peer.name],
            )
        )
    publish(f"SmolLM2-135M on {os.cpu_count()} cores, medians", table, chosen.json)
    if chosen.quick:
        print("--quick leaves ray.serve.llm out: three engines do not start within a minute.")


if __name__ == "__main__":
    main()
