"""A cluster whose nodes come and go with its load, on Ray's fake multi-node provider; run by test_node_scaling.

    python -m tests.serve.fake_nodes OUT.json        in network and process namespaces of its own

The head has one fake GPU, a second node with one can be added. A model's replicas take 0.25 of a GPU each; load makes
more of them than the head holds, so Ray's autoscaler adds the node, and removes it when the load has gone. Writes what
was seen, with seconds since the load began or ended.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import ray
import yaml
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FakeMultiNodeProvider

from tests.chaos.load import OpenLoop
from tests.chaos.outcomes import Outcome
from tests.conftest import app_of, config_of

SLOTS, TOKENS_PER_S, TOKENS = 4, 20, 20  # a replica answers 4 requests a second
RATE_RPS = 24.0  # more than the four replicas on the head can do
MOST = 8  # replicas: two cards of four
_DASHBOARD = "http://127.0.0.1:8265/api/serve/applications/"
_TOKEN = "0123456789abcdef" * 4
_TIMEOUT_S = 150
# What a cluster launcher would run; the autoscaler wants to see them.
_COMMANDS = (
    "setup_", "head_setup_", "worker_setup_", "initialization_", "head_start_ray_", "worker_start_ray_",
)  # fmt: skip


class Nodes:
    """What `ask` takes for a system."""

    http = "http://127.0.0.1:8000"


def serve_config(data_dir: str) -> dict[str, Any]:
    """The scripted system without retrieval, its replicas on quarters of a GPU."""
    config = config_of("scripted", auth={"mode": "open"}, announce_url=None, retrieval=None)
    config["applications"] = [a for a in config["applications"] if a["name"] != "retrieval"]
    for app in config["applications"]:
        if "storage" in app["args"]:
            app["args"]["storage"] |= {"data_dir": data_dir}
    model = app_of(config, "build_model")
    model["args"]["engine"]["scripted"] = {
        "max_sequences": SLOTS, "itl_base_s": 1 / TOKENS_PER_S, "itl_per_sequence_s": 0, "prefill_tokens_per_s": None,
    }  # fmt: skip
    quick = {"metrics_interval_s": 0.2, "look_back_period_s": 1, "upscale_delay_s": 0, "downscale_delay_s": 0}
    model["autoscaling_policy"] = {
        "policy_function": "app.scaling:QueuePolicy",
        "policy_kwargs": {"LLMReplica": {"smoothing_s": 1, "hold_s": 3}},
    }
    model["deployments"] = [
        {"name": "BatchingQueue", "autoscaling_config": {"min_replicas": 1, "max_replicas": 1} | quick},
        {
            "name": "LLMReplica",
            "ray_actor_options": {"num_cpus": 0.1, "num_gpus": 0.25},
            "autoscaling_config": {"min_replicas": 1, "max_replicas": MOST} | quick,
        },
    ]
    return config


def autoscaling_config() -> dict[str, Any]:
    """What `ray up` would hand the head: one more node with a GPU at most."""
    node = {"CPU": 8, "GPU": 1, "object_store_memory": 10**8}
    return {
        "cluster_name": "fake",
        "max_workers": 1,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 0.1,
        "provider": {
            "type": "external",
            "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}",
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
        },
        "head_node_type": "ray.head.default",
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        **{f"{name}commands": [] for name in _COMMANDS},
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 8, "GPU": 1}, "node_config": {}, "max_workers": 0},
            "gpu": {"resources": node, "node_config": {}, "min_workers": 0, "max_workers": 1},
        },
    }


def start_head(folder: Path) -> subprocess.Popen:
    """The head, with Ray's autoscaler on the fake provider (`ray.cluster_utils` would end every Ray on the machine)."""
    path = folder / "autoscaling.json"
    path.write_text(json.dumps(autoscaling_config()))
    environment = {
        "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }  # fmt: skip
    os.environ.update(environment)
    command = [
        "ray",
        "start",
        "--head",
        "--block",
        f"--autoscaling-config={path}",
        "--num-cpus=8",
        "--num-gpus=1",
    ]
    with (folder / "head.log").open("wb") as log:
        return subprocess.Popen([*command, "--object-store-memory=100000000"], stdout=log, stderr=log)


def put(config: dict[str, Any], until: float) -> None:
    """Deploy, once the dashboard takes it, and wait until it runs."""
    headers = {"authorization": f"Bearer {_TOKEN}"}
    deployed, said = False, "nothing"
    while time.monotonic() < until:
        try:
            if not deployed:
                answer = httpx.put(_DASHBOARD, json=config, headers=headers, timeout=10)
                deployed, said = answer.is_success, answer.text
            apps = httpx.get(_DASHBOARD, headers=headers, timeout=10).json()["applications"]
            said = str({name: (app["status"], app["message"]) for name, app in apps.items()}) or said
            if deployed and {app["status"] for app in apps.values()} == {"RUNNING"}:
                return
        except (httpx.HTTPError, ValueError, KeyError) as error:
            said = repr(error)
        time.sleep(0.5)
    raise TimeoutError(f"the applications do not run: {said[-1000:]}")


def replicas_by_node() -> Counter[str]:
    """Running replicas of the pool on each node."""
    headers = {"authorization": f"Bearer {_TOKEN}"}
    apps = httpx.get(_DASHBOARD, headers=headers, timeout=10).json()["applications"]
    pool = apps["scripted"]["deployments"]["LLMReplica"]["replicas"]
    return Counter(r["node_id"] for r in pool if r["state"] == "RUNNING")


def nodes() -> int:
    return sum(node["Alive"] for node in ray.nodes())


async def scene() -> dict[str, Any]:
    """Load until both nodes are full of replicas, then none until one node is left."""
    began = time.monotonic()
    seen: dict[str, Any] = {}
    async with OpenLoop(Nodes, RATE_RPS, TOKENS, stream=True) as load:  # type: ignore[arg-type]
        while time.monotonic() - began < _TIMEOUT_S:
            await asyncio.sleep(0.5)
            count, placed = await asyncio.to_thread(nodes), await asyncio.to_thread(replicas_by_node)
            if count == 2:
                seen.setdefault("second_node_s", time.monotonic() - began)
            if len(placed) == 2:
                seen.setdefault("replicas_there_s", time.monotonic() - began)
                seen["most_on_a_node"] = max(placed.values())
            if sum(placed.values()) > 4:
                break
    seen["failed"] = sum(call.outcome not in {Outcome.OK, Outcome.SHED} for call in load.calls)
    ended = time.monotonic()
    while await asyncio.to_thread(nodes) > 1 and time.monotonic() - ended < _TIMEOUT_S:
        await asyncio.sleep(0.5)
    seen |= {"back_to_one_s": time.monotonic() - ended, "nodes_at_end": nodes()}
    return seen


def main() -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _TOKEN, "RAY_worker_niceness": "0"}
    with tempfile.TemporaryDirectory(prefix="shoal-nodes-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        os.environ["HOME"] = name
        head = start_head(folder)
        try:
            put(yaml.safe_load(yaml.safe_dump(serve_config(f"{name}/data"))), time.monotonic() + _TIMEOUT_S)
            ray.init("127.0.0.1:6379", logging_level="ERROR", log_to_driver=False)
            Path(sys.argv[1]).write_text(json.dumps(asyncio.run(scene())))
        except BaseException:
            print((folder / "head.log").read_text()[-3000:], file=sys.stderr)
            raise
        finally:
            ray.shutdown()  # a driver whose cluster is gone ends with status 1
            head.kill()


if __name__ == "__main__":
    main()
