"""What the KubeRay operator makes of a RayService: pods' commands and environments, and the Serve configuration.

Follows ray-operator/controllers/ray/common/pod.go of KubeRay 1.7 and its RayService controller; the autoscaler's
container is left out, and the init container `wait-gcs-ready` is a wait of ours for the same port.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx
from kubernetes.utils.quantity import parse_quantity

Object = dict[str, Any]
NAMESPACE = "default"
GCS_PORT = "6379"
RECONCILE_S = 2.0  # between two looks of the operator
# Flags of `ray start` that take a value even where it reads like a switch.
_WITH_VALUE = {"log-color", "include-dashboard", "include-log-monitor"}


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How a pod's Ray container is started."""

    command: list[str]
    env: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What `envFrom` and `secretKeyRef` name: values by name and key."""

    config_maps: Mapping[str, Mapping[str, str]]
    secrets: Mapping[str, Mapping[str, str]]


def head_service(cluster: str) -> str:
    """Name of the service that leads to a cluster's head."""
    return f"{cluster}-head-svc.{NAMESPACE}.svc.cluster.local"


def launch(rayservice: Object, group: Object, cluster: str, pod: str, sources: Sources) -> Launch:
    """Command and environment of one pod.

    Args:
        rayservice: as rendered.
        group: its headGroupSpec, or one of its workerGroupSpecs.
        cluster: name of the RayCluster.
        pod: name of the pod.
        sources: where values of the environment come from.
    """
    spec = rayservice["spec"]["rayClusterConfig"]
    is_head = "groupName" not in group
    container = group["template"]["spec"]["containers"][0]
    options = spec["gcsFaultToleranceOptions"]
    start = _start_params(group, container, cluster, is_head=is_head)
    declared = [*container.get("env", [])]
    if is_head:
        start["redis-password"] = "$REDIS_PASSWORD"
        declared += [
            {"name": "RAY_external_storage_namespace", "value": cluster},  # the RayCluster's UID, there
            {"name": "RAY_REDIS_ADDRESS", "value": options["redisAddress"]},
            {"name": "REDIS_PASSWORD", **options["redisPassword"]},
        ]
    else:
        declared.append({"name": "RAY_gcs_rpc_server_reconnect_timeout_s", "value": "600"})
    token = {"secretKeyRef": {"name": spec["authOptions"]["secretName"], "key": "auth_token"}}
    declared += [{"name": "RAY_AUTH_MODE", "value": "token"}, {"name": "RAY_AUTH_TOKEN", "valueFrom": token}]
    command = f"ray start {'--head ' if is_head else ''}{_flags(start)}"
    ip = "127.0.0.1" if is_head else head_service(cluster)
    if not is_head:
        declared += [{"name": "FQ_RAY_IP", "value": ip}, {"name": "RAY_IP", "value": ip.partition(".")[0]}]
    managed = {
        "RAY_CLUSTER_NAME": cluster,
        "RAY_CLUSTER_NAMESPACE": NAMESPACE,
        "RAY_CLOUD_INSTANCE_ID": pod,
        "RAY_NODE_TYPE_NAME": "headgroup" if is_head else group["groupName"],
        "KUBERAY_GEN_RAY_START_CMD": command,
        "RAY_PORT": GCS_PORT,
        "RAY_timeout_ms_task_wait_for_death_info": "0",
        "RAY_gcs_server_request_timeout_seconds": "5",
        "RAY_SERVE_KV_TIMEOUT_S": "5",
        "RAY_ADDRESS": f"{ip}:{GCS_PORT}",
        "RAY_USAGE_STATS_KUBERAY_IN_USE": "1",
        "RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE": "1",
    }
    env: dict[str, str] = {}
    for source in container.get("envFrom", []):
        env |= sources.config_maps[source["configMapRef"]["name"]]
    for entry in declared:
        env[entry["name"]] = value_of(entry, sources.secrets)
    shell = ["/bin/bash", "-c", "--", f"ulimit -n ${{RAY_START_ULIMIT_OPEN_FILES:-65536}}; {command}"]
    return Launch(command=shell, env=managed | env)


def value_of(entry: Object, secrets: Mapping[str, Mapping[str, str]]) -> str:
    """The value of one `env` entry."""
    if "value" in entry:
        return entry["value"]
    reference = entry["valueFrom"]["secretKeyRef"]
    return secrets[reference["name"]][reference["key"]]


def _start_params(group: Object, container: Object, cluster: str, *, is_head: bool) -> dict[str, str]:
    limits = container["resources"]["limits"]
    start = dict(group["rayStartParams"])
    if group.get("labels"):
        start["labels"] = ",".join(f"{name}={value}" for name, value in sorted(group["labels"].items()))
    if is_head:
        start.setdefault("dashboard-host", "0.0.0.0")
    else:
        start.setdefault("address", f"{head_service(cluster)}:{GCS_PORT}")
    start.setdefault("metrics-export-port", "8080")
    start.setdefault("dashboard-agent-listen-port", "52365")
    start.setdefault("num-cpus", str(-(-parse_quantity(limits["cpu"]) // 1)))
    start.setdefault("memory", str(int(parse_quantity(limits["memory"]))))
    return start | {"block": "true"}


def _flags(start: Mapping[str, str]) -> str:
    parts = []
    for name, value in sorted(start.items()):
        if value in {"true", "false"} and name not in _WITH_VALUE:
            parts += [f"--{name}"] if value == "true" else []
        else:
            parts.append(f"--{name}={value}")
    return "  ".join(parts)


class Dashboard:
    """The head's REST API, as the operator uses it."""

    def __init__(self, address: str, token: str) -> None:
        self._url = f"http://{address}:8265/api/serve/applications/"
        self._headers = {"authorization": f"Bearer {token}"}

    def put(self, config: Object) -> None:
        """Deploy the Serve configuration."""
        httpx.put(self._url, json=config, headers=self._headers, timeout=10).raise_for_status()

    def statuses(self) -> dict[str, str]:
        """Application → status; empty while the dashboard does not answer."""
        try:
            answer = httpx.get(self._url, headers=self._headers, timeout=5)
            applications = answer.raise_for_status().json()["applications"]
        except (httpx.HTTPError, ValueError):
            return {}
        return {name: application["status"] for name, application in applications.items()}

    def details(self) -> Object:
        """Everything about the applications."""
        return (
            httpx.get(self._url, headers=self._headers, timeout=5).raise_for_status().json()["applications"]
        )


def await_port(address: str, port: int, timeout_s: float) -> None:
    """Until something listens there."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((address, port), timeout=1).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return
