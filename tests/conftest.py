"""Fixtures that several folders share: running systems, started as users start them.

A system is a child process (`tests.cluster`) that tests reach over HTTP. One of each kind serves the whole
session; a test that kills or changes something starts its own.
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from openai import AsyncOpenAI
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[1]
# What a shell starts in the background ignores Ctrl-C, and so would its children: some tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)
_START_TIMEOUT_S = 240


@dataclass(frozen=True, kw_only=True)
class System:
    """A running Shoal."""

    http: str  # base URL of the gateway
    dashboard: str  # base URL of Ray's dashboard and Serve's REST API
    metrics: str  # what Prometheus scrapes
    address: str  # of the Ray cluster, for drivers
    data_dir: Path
    process: subprocess.Popen
    config: dict[str, Any]

    def client(self, api_key: str = "none") -> AsyncOpenAI:
        """An official OpenAI client for it; retries are ours to see, so it makes none."""
        return AsyncOpenAI(base_url=f"{self.http}/v1", api_key=api_key, max_retries=0, timeout=120)

    def put(self, config: dict[str, Any]) -> None:
        """Deploy a config through Serve's REST API, as KubeRay does."""
        token = (Path.home() / ".ray" / "auth_token").read_text().strip()
        response = httpx.put(
            f"{self.dashboard}/api/serve/applications/",
            json=config,
            headers={"authorization": f"Bearer {token}"},
            timeout=30,
        )
        response.raise_for_status()

    def status(self) -> dict[str, Any]:
        """What Serve says about its applications."""
        token = (Path.home() / ".ray" / "auth_token").read_text().strip()
        response = httpx.get(
            f"{self.dashboard}/api/serve/applications/",
            headers={"authorization": f"Bearer {token}"},
            timeout=30,
        )
        return response.raise_for_status().json()["applications"]

    def wait_for(self, app: str, status: str = "RUNNING", timeout_s: float = 60) -> None:
        """Until an application has this status."""
        deadline = time.monotonic() + timeout_s
        while (seen := self.status().get(app, {}).get("status")) != status:
            assert time.monotonic() < deadline, f"{app} is {seen}, not {status}, after {timeout_s} s"
            time.sleep(0.2)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric over all samples with these labels; 0 when there is none."""
        return sum(self.samples(name, "", **labels).values())

    def samples(self, name: str, by: str, **labels: str) -> dict[str, float]:
        """A metric's samples with these labels, added up by the label `by`."""
        text = httpx.get(self.metrics, timeout=10).raise_for_status().text
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == f"ray_{name}" and labels.items() <= sample.labels.items():
                    key = sample.labels.get(by, "")
                    found[key] = found.get(key, 0) + sample.value
        return found


async def until(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    """Until a condition that is looked up over the network holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"it did not come true within {timeout_s} s"
        await asyncio.sleep(0.2)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running_system(config: dict[str, Any], **env: str) -> Iterator[System]:
    """Start a system from a Serve config on a free port and end it, with everything that it started."""
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(1)
    )  # a benchmark that is told to stop ends its system, too
    with tempfile.TemporaryDirectory(prefix="shoal-", ignore_cleanup_errors=True) as folder:
        config = json.loads(json.dumps(config))
        config.setdefault("http_options", {}).update({"host": "127.0.0.1", "port": free_port()})
        chroma_port = free_port()
        for app in config["applications"]:
            if "storage" in app.get("args", {}):
                app["args"]["storage"] |= {"data_dir": f"{folder}/data", "chroma_port": chroma_port}
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        log = (Path(folder) / "log").open("w+")
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster", str(path)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "RAY_AUTH_MODE": "token", "RAY_worker_niceness": "0", **env},
            start_new_session=True,
        )
        try:
            yield _ready(process, log, Path(folder), config)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            process.stdout.close()
            log.close()


def _ready(process: subprocess.Popen, log: Any, folder: Path, config: dict[str, Any]) -> System:
    deadline = time.monotonic() + _START_TIMEOUT_S
    assert process.stdout is not None
    for line in process.stdout:  # the driver forwards the actors' output before its own last line
        if line.startswith("{") and "dashboard" in line:
            return System(**json.loads(line), data_dir=folder, process=process, config=config)
        if time.monotonic() > deadline:
            break
    log.seek(0)
    pytest.fail(f"the system did not start:\n{log.read()[-6000:]}")


def config_of(name: str, **gateway: Any) -> dict[str, Any]:
    """One of configs/, with some arguments of its gateway changed."""
    config = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    for app in config["applications"]:
        if app["import_path"] == "app.main:build_gateway":
            app["args"] |= gateway
    return config


def app_of(config: dict[str, Any], import_path: str) -> dict[str, Any]:
    """The first application with this builder."""
    return next(app for app in config["applications"] if app["import_path"] == f"app.main:{import_path}")


@pytest.fixture(scope="session")
def scripted() -> Iterator[System]:
    """configs/scripted.yaml, in open mode, with an engine that breaks on demand."""
    config = config_of("scripted", auth={"mode": "open"})
    app_of(config, "build_model")["args"]["engine"]["scripted"]["allow_directives"] = True
    with running_system(config) as system:
        yield system
