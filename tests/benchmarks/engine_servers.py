"""The servers that the engine benchmark compares, each started on a free port and ended with its block.

Called by `engine`. Settings are equal as far as the peers allow; what `VllmEngine` sets in its environment, they
get in theirs.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.conftest import ROOT, app_of, config_of, free_port, running_system

SHOAL, BARE, RAY = "shoal", "vLLM's server", "ray.serve.llm"
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
    with child(command, ENVIRONMENT, grace_s=0) as process:
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
    with child(command, {**ENVIRONMENT, "PYTHONPATH": path}, grace_s=20) as process:
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
def child(command: list[str], env: dict[str, str], grace_s: float) -> Iterator[subprocess.Popen]:
    """A process that ends with the block, and all below it; its output is shown when it does not start.

    After SIGTERM it has `grace_s` to clean up.
    """
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
            with suppress(subprocess.TimeoutExpired):
                process.wait(grace_s)
            for left in below:
                with suppress(psutil.NoSuchProcess):
                    left.kill()
            process.kill()
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
