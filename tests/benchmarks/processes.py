"""What the processes of a running system cost: processor seconds and memory, over the whole tree.

Benchmarks call it with the process that they started; everything that Shoal and Ray start is below that one.
"""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress

import psutil

# First match wins, on the command line. Ray names its workers by what they run.
_ROLES = [
    (r"ServeReplica:\w*:Gateway", "gateway"),
    (r"ServeReplica:.*:BatchingQueue", "queue"),
    (r"ServeReplica:.*:LLMReplica", "llm replica"),
    (r"VLLM::|EngineCore", "engine core"),
    (r"ServeReplica:.*:Embedder", "embedder"),
    (r"ServeReplica:.*:Retriever", "retriever"),
    (r"ServeReplica:.*:JobRunner", "job runner"),
    (r"ServeReplica:.*:(ValkeyServer|ChromaServer|NoLocalServices)", "local services"),
    (r"valkey-server", "valkey"),
    (r"chromadb_rust_bindings", "chroma"),
    (r"ServeController|ProxyActor|haproxy", "serve controller, proxy"),
    (r"api_server", "vllm api server"),
    (r"ray::IDLE|default_worker\.py", "ray idle workers"),
    (r"ray::|raylet|gcs_server|ray[/_]", "ray daemons"),
    (r"serve run|tests\.cluster", "serve run"),
]


def cpu_by_role(pid: int) -> Counter[str]:
    """Processor seconds of a process and all below it, by role; ended ones count for whoever waited for them."""
    found: Counter[str] = Counter()
    for process in _tree(pid):
        with suppress(psutil.NoSuchProcess):
            found[role_of(" ".join(process.cmdline()))] += sum(process.cpu_times()[:4])
    return found


def memory_by_role(pid: int) -> Counter[str]:
    """MB of proportional set size (shared pages are split among those who share them), by role."""
    found: Counter[str] = Counter()
    for process in _tree(pid):
        with suppress(psutil.NoSuchProcess):  # it ended between the two looks
            found[role_of(" ".join(process.cmdline()))] += process.memory_full_info().pss / 1e6
    return found


def role_of(command_line: str) -> str:
    """Which part of the system a process is."""
    return next((role for pattern, role in _ROLES if re.search(pattern, command_line)), "other")


def _tree(pid: int) -> Iterator[psutil.Process]:
    root = psutil.Process(pid)
    yield root
    yield from root.children(recursive=True)
