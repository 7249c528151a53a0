"""Shoal on a real model beside vLLM's own OpenAI server and `ray.serve.llm`: same model, settings and load.

    python -m tests.benchmarks.engine [--quick] [--json FILE] [--tokens N]

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
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from actors.engines.model_files import resolve_model
from tests.benchmarks.processes import cpu_by_role, memory_by_role
from tests.benchmarks.report import Row, parser, publish
from tests.conftest import ROOT, app_of, config_of, free_port, running_system

SHOAL, BARE, RAY = "shoal", "vLLM's server", "ray.serve.llm"
STREAMS = (1, 8, 16)
PEER_PACKAGES = ("hf_transfer==0.1.9", "jsonref==1.1.0", "pyarrow==26.0.1", "pybind11==3.1.0")
START_TIMEOUT_S = 300.0

# What `VllmEngine` sets for itself, given to the peers too.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "RAY_AUTH_MODE": "token",
    "RAY_worker_niceness": "0",
}


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server under test."""

    name: str
    url: str
    model: str  # what requests call it
    pid: int  # root of its process tree

    def engines(self) -> list[psutil.Process]:
        """vLLM's own processes in its tree."""
        below = psutil.Process(self.pid).children(recursive=True)
        return [process for process in below if process.name().startswith("VLLM::")]


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One server under one number of streams, in one round."""

    tokens_per_s: float
    ttft_ms: float  # median over requests
    tpot_ms: float
    cpu_ms_per_token: float  # of the server's whole process tree


def shoal_config() -> dict[str, Any]:
    """configs/local.yaml without documents and storage: its model and its gateway."""
    base = config_of("local", auth={"mode": "open"}, retrieval=None)
    base["applications"] = [app_of(base, "build_model"), app_of(base, "build_gateway")]
    return base


@contextmanager
def shoal() -> Iterator[Server]:
    config = shoal_config()
    with running_system(config) as system:
        model = app_of(config, "build_model")["args"]["model"]
        yield Server(name=SHOAL, url=system.http, model=model, pid=system.process.pid)


@contextmanager
def bare(folder: str, engine: dict[str, Any]) -> Iterator[Server]:
    """`python -m vllm.entrypoints.openai.api_server`: the `vllm` command does not run in vllm-cpu."""
    port = free_port()
    options = [
        f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
        for name, value in engine.items()
    ]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--model={folder}", "--served-model-name=m",
        "--host=127.0.0.1", f"--port={port}", "--disable-uvicorn-access-log", *options,
    ]  # fmt: skip
    with child(command, ENVIRONMENT) as process:
        url = f"http://127.0.0.1:{port}"
        wait_until_it_answers(process, url)
        yield Server(name=BARE, url=url, model="m", pid=process.pid)


@contextmanager
def ray_serve_llm(folder: str, engine: dict[str, Any]) -> Iterator[Server]:
    port = free_port()
    command = [
        sys.executable, "-m", "tests.benchmarks.ray_serve_llm", folder, json.dumps(engine),
        "--name=m", f"--port={port}",
    ]  # fmt: skip
    path = os.pathsep.join([str(peer_packages()), str(ROOT)])
    with child(command, {**ENVIRONMENT, "PYTHONPATH": path}) as process:
        url = f"http://127.0.0.1:{port}"
        wait_until_it_answers(process, url)
        yield Server(name=RAY, url=url, model="m", pid=process.pid)


def peer_packages() -> Path:
    """A folder with what `ray.serve.llm` needs beyond our environment; installed when missing."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    folder = cache / "shoal-benchmarks" / "ray-serve-llm"
    if not (folder / "done").exists():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
        subprocess.run([*install, f"--target={folder}", *PEER_PACKAGES], check=True)
        (folder / "done").touch()
    return folder


@contextmanager
def child(command: list[str], env: dict[str, str]) -> Iterator[subprocess.Popen]:
    """A process group that ends with the block; its output is shown when it does not start."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **env}, stdout=log, stderr=log, start_new_session=True
        )
        try:
            yield process
        except ServerDied:
            log.seek(0)
            sys.stderr.write(log.read()[-4000:])
            raise
        finally:
            below = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            process.terminate()
            _, alive = psutil.wait_procs([psutil.Process(process.pid), *below] if below else [], timeout=20)
            for left in alive:
                left.kill()
            process.wait()


class ServerDied(Exception):
    """A server ended, or does not answer, before it could be measured."""


def wait_until_it_answers(process: subprocess.Popen, url: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/v1/models", timeout=5).json().get("data"):
                return
        except (httpx.HTTPError, ValueError):
            pass
        time.sleep(0.3)
    raise ServerDied(f"{url} did not come up")


def prompt(number: int) -> str:
    """About 100 tokens that end in a request for more; unlike every other number's from the start."""
    topics = (
        "the sea",
        "a lighthouse",
        "an old clock",
        "the desert",
        "a small town",
        "winter",
        "a long bridge",
    )
    topic = topics[number % len(topics)]
    return (
        f"Request {number}. You help a writer who collects short scenes for a book about travel and memory. Each "
        f"scene has a place, a person and something that goes wrong, and it is told in plain words by somebody who "
        f"was there. The book is read aloud in schools, so that sentences must be short and clear. Do not make "
        f"lists, do not explain what you do, and do not stop early. Write a long story about {topic}, and begin "
        f"with what the storyteller sees in the morning from the window of the kitchen."
    )


async def stream(
    http: httpx.AsyncClient, server: Server, number: int, tokens: int
) -> tuple[float, float, int]:
    """One streamed chat: seconds to the first text, seconds to the last, tokens by the server's own count."""
    body = {
        "model": server.model,
        "messages": [{"role": "user", "content": prompt(number)}],
        "max_tokens": tokens,
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


async def measure(server: Server, streams: int, numbers: range, tokens: int) -> Figures:
    """Closed loop: `streams` clients share the requests `numbers`."""
    waiting = iter(numbers)
    done: list[tuple[float, float, int]] = []
    limits = httpx.Limits(max_connections=streams)
    async with httpx.AsyncClient(timeout=300, limits=limits) as http:

        async def client() -> None:
            done.extend([await stream(http, server, number, tokens) for number in waiting])

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


def rounds(
    servers: list[Server], count: int, tokens: int, waves: dict[int, int]
) -> dict[tuple[str, int], list[Figures]]:
    """Every server under every number of streams, `count` times; a wave is one request per stream."""
    found: dict[tuple[str, int], list[Figures]] = {}
    number = 0
    for turn in range(count):
        for streams in STREAMS:
            numbers = range(number, number := number + streams * waves[streams])
            for server in servers[turn % len(servers) :] + servers[: turn % len(servers)]:
                with only(server, servers):
                    figures = asyncio.run(measure(server, streams, numbers, tokens))
                found.setdefault((server.name, streams), []).append(figures)
    return found


@contextmanager
def only(server: Server, servers: list[Server]) -> Iterator[None]:
    """The other servers' engines stand still meanwhile."""
    stopped = [engine for other in servers if other is not server for engine in other.engines()]
    for engine in stopped:
        engine.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for engine in stopped:
            engine.send_signal(signal.SIGCONT)


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
    options = parser(__doc__.partition("\n")[0])
    options.add_argument("--tokens", type=int, default=32, help="output tokens per request")
    chosen = options.parse_args()
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
        for server in servers:
            asyncio.run(measure(server, streams=2, numbers=range(-2, 0), tokens=2))
        if chosen.quick:
            found = rounds(servers, 1, 16, {1: 2, 8: 1, 16: 1})
        else:
            found = rounds(servers, 5, chosen.tokens, {1: 6, 8: 2, 16: 2})
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
