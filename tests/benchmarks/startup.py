"""Start-up: from the command to "Shoal is ready" and to the first answer, and the memory of every process then.

    python -m tests.benchmarks.startup [--quick] [--json FILE]

`serve run` of configs/local.yaml on free ports and an empty data directory, ended by Ctrl-C. The model's weights
were prepared before (that happens once per machine). The baseline, in the same run, is vLLM's own server on the
same prepared folder with the same engine settings and none of Shoal's or Ray's processes.

Memory is the proportional set size: pages that processes share are split among them, so it adds up. `--quick`
gives the baseline what is left of its 60 s, and leaves it out when that is too little.
"""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

from actors.engines.model_files import resolve_model
from app.config import ModelArgs
from tests.benchmarks.processes import cpu_by_role, memory_by_role
from tests.benchmarks.report import Row, parser, publish
from tests.conftest import ROOT, app_of, config_of, free_port

_QUICK_S = 55.0
_LEAST_BARE_S = 20.0  # it was never faster: no use in trying
_START_TIMEOUT_S = 300.0
_POLL_S = 0.1
_STOP_S = 60.0
_BARE = "vLLM's server"
_READY = "Shoal is ready"
# What the command prints, and what is done by then.
_PHASES = {
    "Started a local Ray instance": "ray_up_s",
    "Submitted deploy config": "serve_up_s",
    "embedder_ready": "embedder_ready_s",
    "replica_ready": "engine_ready_s",
    _READY: "startup_s",
}


class TooLate(Exception):
    """The server was not ready within the time that it was given."""


@dataclass
class Start:
    """One start of a server: seconds from its command, and what it had cost at the first answer."""

    seconds: dict[str, float] = field(default_factory=dict)
    cpu_s: float = 0.0
    memory_mb: Counter[str] = field(default_factory=Counter)


@contextmanager
def server(command: Sequence[str], **env: str) -> Iterator[tuple["subprocess.Popen[str]", float]]:
    """A server in a process group of its own and when it was started; ended by Ctrl-C."""
    # As on a user's machine, whatever this shell says: compiled modules are kept.
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    started = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**inherited, "PYTHONUNBUFFERED": "1", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process, started
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        assert process.stdout is not None
        process.stdout.close()


def shoal(config: dict[str, Any]) -> Start:
    """Start the whole system."""
    start, ready, last = Start(), threading.Event(), []
    with tempfile.TemporaryDirectory(prefix="shoal-", ignore_cleanup_errors=True) as folder:
        url = on_free_ports(config, folder)
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        command = [str(Path(sys.executable).with_name("serve")), "run", str(path)]
        with server(command, RAY_AUTH_MODE="token") as (process, started):

            def read() -> None:
                for line in process.stdout or ():
                    last.append(line)
                    for mark, phase in _PHASES.items():
                        if mark in line:
                            start.seconds.setdefault(phase, time.monotonic() - started)
                    if _READY in line:
                        ready.set()

            threading.Thread(target=read, daemon=True).start()
            if not ready.wait(_START_TIMEOUT_S):
                raise TooLate("".join(last[-50:]))
            ask(url, app_of(config, "build_model")["args"]["model"])
            start.seconds["first_answer_s"] = time.monotonic() - started
            start.cpu_s = cpu_by_role(process.pid).total()
            start.memory_mb = memory_by_role(process.pid)
    return start


def on_free_ports(config: dict[str, Any], folder: str) -> str:
    """Keep the system apart from others on this machine; its URL."""
    port, chroma_port = free_port(), free_port()
    url = f"http://127.0.0.1:{port}"
    config["http_options"] |= {"host": "127.0.0.1", "port": port}
    for app in config["applications"]:
        if "storage" in app["args"]:
            app["args"]["storage"] |= {"data_dir": f"{folder}/data", "chroma_port": chroma_port}
    app_of(config, "build_gateway")["args"]["announce_url"] = url
    return url


def bare(model: ModelArgs, folder: str, timeout_s: float) -> Start:
    """Start vLLM's own server on the same weights.

    Raises:
        TooLate: it takes longer.
    """
    vllm = model.engine.vllm
    assert vllm is not None
    if timeout_s < _LEAST_BARE_S:
        raise TooLate
    port = free_port()
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        "--host=127.0.0.1", f"--port={port}", f"--model={folder}", f"--served-model-name={model.model}",
        f"--dtype={vllm.dtype}", f"--max-model-len={vllm.max_model_len}", f"--max-num-seqs={vllm.max_num_seqs}",
        f"--kv-cache-memory-bytes={vllm.kv_cache_memory_bytes}",
        *(["--enforce-eager"] if vllm.enforce_eager else []),
    ]  # fmt: skip
    env = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(vllm.omp_threads)}
    start, url = Start(), f"http://127.0.0.1:{port}"
    with server(command, VLLM_NO_USAGE_STATS="1", **env) as (process, started):
        threading.Thread(target=lambda: [None for _ in process.stdout or ()], daemon=True).start()
        while not answers(f"{url}/health"):
            if time.monotonic() - started > timeout_s or process.poll() is not None:
                raise TooLate
            time.sleep(_POLL_S)
        start.seconds["startup_s"] = time.monotonic() - started
        ask(url, model.model)
        start.seconds["first_answer_s"] = time.monotonic() - started
        start.cpu_s = cpu_by_role(process.pid).total()
        start.memory_mb = memory_by_role(process.pid)
    return start


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).is_success
    except httpx.HTTPError:
        return False


def ask(url: str, model: str) -> None:
    """One short chat completion."""
    body = {"model": model, "max_tokens": 8, "messages": [{"role": "user", "content": "Hello!"}]}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
    assert answer.is_success, f"no answer to the first request: {answer.status_code} {answer.text}"


def rows(system: Start, baseline: Start | None) -> list[Row]:
    compared = baseline.seconds if baseline else {}
    memory = baseline.memory_mb if baseline else Counter[str]()
    found = [
        _row(name, seconds, "s", compared.get(name))
        for name, seconds in sorted(system.seconds.items(), key=lambda item: item[1])
    ]
    found.append(_row("startup_cpu_s", system.cpu_s, "s", baseline.cpu_s if baseline else None))
    found.append(
        _row("memory_total_mb", system.memory_mb.total(), "MB", memory.total() if baseline else None)
    )
    same = {"llm replica": "vllm api server"}  # the process in front of the engine, in either
    for role, used in system.memory_mb.most_common():
        name = f"memory_{role.replace(', ', '_').replace(' ', '_')}_mb"
        found.append(_row(name, used, "MB", memory.get(same.get(role, role))))
    return found


def _row(name: str, value: float, unit: str, baseline: float | None) -> Row:
    return Row(
        name=name, value=value, unit=unit, baseline=_BARE if baseline else None, baseline_value=baseline
    )


def main() -> None:
    options = parser(__doc__.partition("\n")[0])
    given = options.parse_args()
    config = config_of("local")
    model = ModelArgs(**app_of(config, "build_model")["args"])
    assert model.engine.vllm is not None
    files = resolve_model(model.engine.vllm.model, model.cache_dir.expanduser())
    began = time.monotonic()
    system = shoal(config)
    left_s = _QUICK_S - (time.monotonic() - began) if given.quick else _START_TIMEOUT_S
    baseline, title = None, "Start-up of configs/local.yaml"
    try:
        baseline = bare(model, files.model, left_s)
    except TooLate:
        title += f"; no baseline: {_BARE} was not ready within the {left_s:.0f} s left"
    publish(title, rows(system, baseline), given.json)


if __name__ == "__main__":
    main()
