"""Other gateways, each in an environment of its own, started on loopback and ended with its block.

Called by `gateway` and `token_path`, one after another. Versions are pinned: the figures are theirs.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import yaml

from actors.engines.model_files import resolve_model
from tests.benchmarks.engine_servers import ServerDied, child
from tests.benchmarks.environments import environment
from tests.benchmarks.measured import Target
from tests.conftest import app_of, config_of, free_port

LITELLM, SMG, VLLM_ROUTER = ("litellm[proxy]==1.106.2",), ("smg==1.13.0",), ("vllm-router==0.1.17",)
DYNAMO = (
    ("ai-dynamo-runtime==1.6.1",),
    ("--no-deps", "ai-dynamo==1.6.1"),
    ("transformers", "fastapi", "uvicorn", "uvloop", "pyzmq", "msgpack", "msgspec", "prometheus_client", "pyyaml",
     "aiohttp", "httpx", "psutil"),
)  # fmt: skip
_KEY = "sk-benchmark-5f0c1e6a9b7d42d8"  # LiteLLM's master key, for the time of the run
_START_TIMEOUT_S = 120.0
_DYNAMO_HOSTS = (
    "DYN_TCP_RPC_HOST",
    "DYN_TCP_RESPONSE_STREAM_HOST",
    "DYN_EVENT_PLANE_HOST",
    "DYN_SYSTEM_HOST",
)
UNPACED = 1000.0  # 0, "infinite" by its help, runs at 1
PACED = 0.31  # 50 tokens/s per stream at 64 streams


@contextmanager
def backend() -> Iterator[Target]:
    """The zero-service-time mock, on uvicorn's fastest parts."""
    port = free_port()
    command = [
        sys.executable, "-m", "uvicorn", "tests.benchmarks.zero_backend:app", "--host=127.0.0.1", f"--port={port}",
        "--loop=uvloop", "--http=httptools", "--log-level=warning", "--no-access-log",
    ]  # fmt: skip
    with child(command, {}, grace_s=2) as process:
        yield _ready(process, port)


@contextmanager
def litellm() -> Iterator[Target]:
    """LiteLLM's proxy with a master key, before the mock."""
    programs, port = environment("litellm", LITELLM), free_port()
    with backend() as mock, tempfile.TemporaryDirectory(prefix="shoal-") as folder:
        route = {"model": "openai/scripted", "api_base": f"{mock.url}/v1", "api_key": "none"}
        config = {
            "model_list": [{"model_name": "scripted", "litellm_params": route}],
            "general_settings": {"master_key": _KEY},
        }
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        command = [str(programs / "litellm"), "--config", str(path), "--host=127.0.0.1", f"--port={port}",
                   "--num_workers=1", "--telemetry=False"]  # fmt: skip
        headers = {"authorization": f"Bearer {_KEY}"}
        # Prices from its package, not from the network.
        with child(command, {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}, grace_s=2) as process:
            yield _ready(process, port, headers=headers)


@contextmanager
def smg() -> Iterator[Target]:
    """The Rust router that was SGLang's gateway, before the mock."""
    programs = environment("smg", SMG)
    ports = ["--prometheus-host=127.0.0.1", f"--prometheus-port={free_port()}", "--log-level=warn"]
    with _router([str(programs / "smg"), "launch", *ports]) as target:
        yield target


@contextmanager
def vllm_router() -> Iterator[Target]:
    """vLLM's Rust router, before the mock."""
    programs = environment("vllm-router", VLLM_ROUTER)
    ports = [f"--prometheus-port={free_port()}", "--log-level=warning"]
    with _router([str(programs / "vllm-router"), *ports]) as target:
        yield target


@contextmanager
def _router(command: list[str]) -> Iterator[Target]:
    port = free_port()
    with backend() as mock:
        command = [
            *command, "--host=127.0.0.1", f"--port={port}", "--worker-urls", mock.url, "--policy=round_robin",
        ]  # fmt: skip
        with child(command, {}, grace_s=2) as process:
            yield _ready(process, port)


@contextmanager
def dynamo(speedup: float, workers: int = 1, options: Sequence[str] = ()) -> Iterator[Target]:
    """Dynamo's frontend before mockers, each of which simulates a GPU.

    Args:
        speedup: of a mocker over its simulated GPU: `UNPACED` or `PACED`.
        workers: how many mockers.
        options: further ones of theirs.

    Yields:
        All together; their parts are "frontend" and "mocker", "mocker 2", ...
    """
    programs, port, model = environment("dynamo", *DYNAMO), free_port(), _model_folder()
    with tempfile.TemporaryDirectory(prefix="shoal-") as folder, ExitStack() as stack:
        env = {"DYN_FILE_KV": folder, "DYN_LOG": "warn", "HF_HUB_OFFLINE": "1"}
        env |= dict.fromkeys(_DYNAMO_HOSTS, "127.0.0.1")
        planes = ["--discovery-backend=file", "--request-plane=tcp", "--event-plane=zmq"]
        python = [str(programs / "python"), "-m"]
        command = [
            *python, "dynamo.mocker", f"--model-path={model}", "--model-name=scripted", *planes,
            f"--speedup-ratio={speedup}", *options,
        ]  # fmt: skip
        mockers = [stack.enter_context(child(command, env, grace_s=2)) for _ in range(workers)]
        frontend = stack.enter_context(
            child(
                [*python, "dynamo.frontend", "--http-host=127.0.0.1", f"--http-port={port}", "--migration-limit=3",
                 *planes],
                env, grace_s=2,
            )
        )  # fmt: skip
        target = _ready(frontend, port)
        names = ("frontend", "mocker", *(f"mocker {number}" for number in range(2, workers + 1)))
        yield replace(target, pids=(frontend.pid, *(mocker.pid for mocker in mockers)), names=names)


def _ready(process: subprocess.Popen, port: int, headers: dict[str, str] | None = None) -> Target:
    """The server once it has answered a chat.

    Raises:
        ServerDied: it ended, or does not answer.
    """
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + _START_TIMEOUT_S
    target = Target(url=url, model="scripted", pids=(process.pid,), headers=headers or {})
    body = {"model": target.model, "max_tokens": 2, "messages": [{"role": "user", "content": "hello there"}]}
    answer = "no connection"
    while time.monotonic() < deadline and process.poll() is None:
        try:
            response = httpx.post(url + target.path, json=body, headers=target.headers, timeout=10)
            if response.status_code == 200:
                return target
            answer = f"status {response.status_code}: {response.text[:200]}"
        except httpx.HTTPError as error:
            answer = repr(error)
        time.sleep(0.3)
    raise ServerDied(f"it did not come up; last: {answer}")


def _model_folder() -> str:
    """A real model's folder, for its tokenizer."""
    model = app_of(config_of("local"), "build_model")["args"]
    cache = Path(model.get("cache_dir", "~/.shoal/models")).expanduser()
    return resolve_model(model["engine"]["vllm"]["model"], cache).model
