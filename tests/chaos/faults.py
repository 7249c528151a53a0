"""Faults on real processes: who is where, and the ways to break them.

Replicas are found through Serve's REST status, what it does not list by name below the test's own cluster process.
Nothing is ended that this cluster did not start.
"""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from tests.chaos.load import MODEL
from tests.conftest import System, until

CONTROLLER = "ray::ServeController"
PROXY = "ray::ProxyActor"
HAPROXY = "haproxy"
_SLOW_START_S = 90


def replicas(
    system: System, app: str = MODEL, deployment: str = "LLMReplica", state: str = "RUNNING"
) -> list[dict[str, Any]]:
    """Replicas as Serve's REST API lists them."""
    found = system.status().get(app, {}).get("deployments", {}).get(deployment, {}).get("replicas", [])
    return [one for one in found if one["state"] == state]


def pids(system: System, app: str = MODEL, deployment: str = "LLMReplica") -> set[int]:
    """Process ids of the running replicas."""
    return {one["pid"] for one in replicas(system, app, deployment)}


def gateways(system: System) -> set[int]:
    return pids(system, "gateway", "Gateway")


def queue(system: System) -> int:
    [pid] = pids(system, MODEL, "BatchingQueue")
    return pid


def processes(system: System, title: str) -> list[int]:
    """Processes of this cluster whose title begins so, or whose program has this name."""
    found = []
    for process in psutil.Process(system.process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            named = process.name() == title or " ".join(process.cmdline()).startswith(title)
            if named and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def kill(pid: int) -> float:
    """kill -9; returns the loop's time of it."""
    os.kill(pid, signal.SIGKILL)
    return asyncio.get_running_loop().time()


@asynccontextmanager
async def stopped(pid: int) -> AsyncIterator[float]:
    """SIGSTOP: the process is there and does nothing. It goes on afterwards, if it still exists."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield asyncio.get_running_loop().time()
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


async def seconds_until_others(
    system: System,
    before: set[int],
    *,
    app: str = MODEL,
    deployment: str = "LLMReplica",
    count: int = 2,
    timeout_s: float = _SLOW_START_S,
) -> float:
    """Seconds until `count` replicas run again and one of them at least is new."""
    started = time.monotonic()

    def there() -> bool:
        now = pids(system, app, deployment)
        return len(now) >= count and now != before

    await until(there, timeout_s=timeout_s)
    return time.monotonic() - started


class Node:
    """A second raylet on this machine, joined to the cluster as its own process: what a node is to Ray."""

    def __init__(self, system: System) -> None:
        # In the default folder `ray start` would note this cluster's address, and every `ray.init()` on the machine
        # would join it.
        self._folder = tempfile.TemporaryDirectory(prefix="shoal-", ignore_cleanup_errors=True)
        self._process = subprocess.Popen(
            [
                str(Path(sys.executable).parent / "ray"), "start", f"--address={system.address}", "--block",
                f"--temp-dir={self._folder.name}", "--num-cpus=8", "--object-store-memory=150000000",
                "--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0",
                "--disable-usage-stats",
            ],
            env={**os.environ, "RAY_AUTH_MODE": "token", "RAY_worker_niceness": "0"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip

    def below(self) -> list[psutil.Process]:
        """All processes of the node."""
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self._process.pid).children(recursive=True)
        return []

    @property
    def raylet(self) -> int:
        """Process id of its raylet."""
        [raylet] = [process.pid for process in self.below() if process.name() == "raylet"]
        return raylet

    def end(self) -> None:
        """End what is left of it."""
        left = self.below()
        for process in [*left, psutil.Process(self._process.pid)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait(30)
        psutil.wait_procs(left, timeout=10)
        self._folder.cleanup()


@asynccontextmanager
async def second_node(system: System) -> AsyncIterator[Node]:
    """A node that has joined when the context begins."""
    node = Node(system)
    try:
        await until(lambda: any(process.name() == "raylet" for process in node.below()), timeout_s=60)
        yield node
    finally:
        node.end()
