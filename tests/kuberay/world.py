"""A small Kubernetes for one RayService: stores, clusters, the operator's loop, and who gets traffic.

Clusters are made from the rendered manifests by `operator_side`, run by `pods` and looked after by `probes`. The
operator's loop here replaces pods that are gone, puts the Serve configuration once the head is Ready, and moves the
service to a new cluster when all of its applications run.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import yaml

from tests.kuberay.operator_side import (
    GCS_PORT,
    RECONCILE_S,
    Dashboard,
    Sources,
    await_port,
    head_service,
    launch,
    value_of,
)
from tests.kuberay.pods import Names, Pod, make_network
from tests.kuberay.probes import Probed

Object = dict[str, Any]
SECRETS = {
    "shoal-ray-auth": {"auth_token": "0123456789abcdef" * 4},
    "shoal-pepper": {"pepper": "fedcba9876543210" * 4},
    "shoal-stores": {
        "redis-password": "store-secret",
        "redis-url": "redis://:store-secret@shoal-redis:6379/1",
        "chroma-url": "http://shoal-chroma:8000",
        "documents-url": "file:///data/documents",
    },
}
# What the images of the stores bring along, where a manifest gives arguments only.
_ENTRYPOINTS = {"chroma": ["chroma"]}
_STORE_TIMEOUT_S = 30
_SAMPLE_S = 0.05


@dataclass(kw_only=True)
class Cluster:
    """One RayCluster of the RayService."""

    name: str
    rayservice: Object
    config: Object  # its Serve configuration
    pods: dict[str, Probed] = field(default_factory=dict)  # "head", "cpu-0", ...
    head_address: str = ""  # of its service
    head_put: Object | None = None  # the configuration that its Serve has

    @property
    def workers(self) -> list[Probed]:
        return [probed for key, probed in self.pods.items() if key != "head"]


class World:
    """Everything that runs; use as an async context, in a network namespace of your own.

    Args:
        folder: for logs and volumes.
        objects: a rendered kustomization.
        config: the Serve configuration to deploy instead of the RayService's.
    """

    def __init__(self, folder: Path, objects: list[Object], config: Object) -> None:
        self._folder = folder
        self._objects = objects
        (self._rayservice,) = [o for o in objects if o["kind"] == "RayService"]
        self._config_maps = {o["metadata"]["name"]: o["data"] for o in objects if o["kind"] == "ConfigMap"}
        self._names = Names(path=folder / "hosts")
        self._addresses = (f"10.77.0.{number}" for number in itertools.count(10))
        self._serial = itertools.count()
        self._stores: list[Pod] = []
        self.active: Cluster | None = None
        self.pending: Cluster | None = self._cluster(self._rayservice, config)
        self.retired: list[Cluster] = []
        self.switched_at: list[float] = []  # time.monotonic()
        self.without_endpoint_s = 0.0  # since the first switch
        self.endpoints_at_switch: list[int] = []
        self._random = random.Random(0)

    async def __aenter__(self) -> Self:
        make_network()
        self._names.set("localhost.localdomain", "127.0.0.1")
        for workload in self._objects:
            if workload["kind"] == "StatefulSet":
                self._stores.append(self._store(workload))
        for store in self._stores:
            port = store.container["ports"][0]["containerPort"]
            await asyncio.to_thread(await_port, store.address, port, _STORE_TIMEOUT_S)
        self._tasks = [asyncio.create_task(self._operate()), asyncio.create_task(self._watch_endpoints())]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        for cluster in [self.active, self.pending, *self.retired]:
            if cluster is not None:
                self.delete(cluster)
        for store in self._stores:
            store.kill()

    # --- what users of the cluster do -----------------------------------------------------------------------

    def apply_config(self, config: Object) -> None:
        """Change `serveConfigV2`: the operator puts it into the running cluster."""
        assert self.active is not None
        self.active.config = config

    def apply_cluster(self, ray_env: Mapping[str, str]) -> None:
        """Change something of rayClusterConfig: a new cluster is made beside the old one.

        Args:
            ray_env: more variables of all Ray pods; a changed ConfigMap has a new name.
        """
        assert self.active is not None
        changed = copy.deepcopy(self.active.rayservice)
        (before,) = [name for name in self._config_maps if name.startswith("shoal-ray-env")]
        after = f"{before}x"
        self._config_maps[after] = {**self._config_maps[before], **ray_env}
        spec = changed["spec"]["rayClusterConfig"]
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            group["template"]["spec"]["containers"][0]["envFrom"] = [{"configMapRef": {"name": after}}]
        self.pending = self._cluster(changed, self.active.config)

    def endpoints(self) -> list[Probed]:
        """Who gets traffic: the Ready workers of the active cluster; the head is excluded."""
        assert self._rayservice["spec"]["excludeHeadPodFromServeSvc"] is True
        return [probed for probed in self.active.workers if probed.ready] if self.active else []

    def endpoint(self) -> Probed:
        """One of them, as kube-proxy chooses.

        Raises:
            ConnectionRefusedError: there is none.
        """
        endpoints = self.endpoints()
        if not endpoints:
            raise ConnectionRefusedError("the service has no endpoint")
        return self._random.choice(endpoints)

    def dashboard(self, cluster: Cluster) -> Dashboard:
        """The REST API of a cluster's head."""
        return Dashboard(cluster.pods["head"].pod.address, SECRETS["shoal-ray-auth"]["auth_token"])

    def delete(self, cluster: Cluster) -> None:
        """End all pods of a cluster."""
        for probed in cluster.pods.values():
            probed.close()
            probed.pod.kill()

    # --- the operator -----------------------------------------------------------------------------------------

    async def _operate(self) -> None:
        while True:
            for cluster in (self.active, self.pending):
                if cluster is not None:
                    await self._reconcile(cluster)
            if self.pending is not None and await self._runs(self.pending):
                if self.active is not None:
                    self.retired.append(self.active)
                self.active, self.pending = self.pending, None
                self.switched_at.append(time.monotonic())
                self.endpoints_at_switch.append(len(self.endpoints()))
            await asyncio.sleep(RECONCILE_S)

    async def _reconcile(self, cluster: Cluster) -> None:
        spec = cluster.rayservice["spec"]["rayClusterConfig"]
        wanted = {"head": spec["headGroupSpec"]}
        for group in spec["workerGroupSpecs"]:
            wanted |= {f"{group['groupName']}-{index}": group for index in range(group["replicas"])}
        for key, group in wanted.items():
            probed = cluster.pods.get(key)
            if probed is not None and (not probed.pod.alive or probed.killed):
                probed.close()
                probed.pod.kill()
                del cluster.pods[key]
            if key not in cluster.pods and (key == "head" or await self._gcs_answers(cluster)):
                cluster.pods[key] = self._start(cluster, key, group)
        if cluster.pods["head"].ready and cluster.head_put != cluster.config:
            with contextlib.suppress(Exception):  # the operator tries again
                await asyncio.to_thread(self.dashboard(cluster).put, cluster.config)
                cluster.head_put = cluster.config

    async def _gcs_answers(self, cluster: Cluster) -> bool:
        try:
            await asyncio.to_thread(await_port, cluster.pods["head"].pod.address, int(GCS_PORT), 0)
        except OSError:
            return False
        return True

    async def _runs(self, cluster: Cluster) -> bool:
        if cluster.head_put is None:
            return False
        statuses = await asyncio.to_thread(self.dashboard(cluster).statuses)
        names = {application["name"] for application in cluster.config["applications"]}
        return set(statuses) == names and set(statuses.values()) == {"RUNNING"}

    async def _watch_endpoints(self) -> None:
        last = time.monotonic()
        while True:
            await asyncio.sleep(_SAMPLE_S)
            now = time.monotonic()
            if self.active is not None and not self.endpoints():
                self.without_endpoint_s += now - last
            last = now

    # --- pods -------------------------------------------------------------------------------------------------

    def _cluster(self, rayservice: Object, config: Object) -> Cluster:
        return Cluster(
            name=f"shoal-{random.Random().randrange(10**5):05}", rayservice=rayservice, config=config
        )

    def _start(self, cluster: Cluster, key: str, group: Object) -> Probed:
        name = f"{cluster.name}-{key}-{next(self._serial)}"
        how = launch(
            cluster.rayservice,
            group,
            cluster.name,
            name,
            Sources(config_maps=self._config_maps, secrets=SECRETS),
        )
        pod = self._pod(name, group["template"]["spec"], how.command, how.env)
        if key == "head":
            # The operator's ENABLE_RAY_HEAD_CLUSTER_IP_SERVICE: a service address that outlives the pod.
            pod.address = cluster.head_address = cluster.head_address or pod.address
        pod.start()
        if key == "head":
            self._names.set(head_service(cluster.name), pod.address)
        return Probed(pod)

    def _store(self, workload: Object) -> Pod:
        name = workload["metadata"]["name"]
        spec = dict(workload["spec"]["template"]["spec"])
        claims = [claim["metadata"]["name"] for claim in workload["spec"]["volumeClaimTemplates"]]
        spec["claimed"] = [
            {"name": c, "persistentVolumeClaim": {"claimName": f"{c}-{name}-0"}} for c in claims
        ]
        container = spec["containers"][0]
        command = container.get("command") or _ENTRYPOINTS[container["name"]]
        env = {entry["name"]: value_of(entry, SECRETS) for entry in container.get("env", [])}
        pod = self._pod(f"{name}-0", spec, [*command, *container.get("args", [])], env)
        pod.start()
        self._names.set(name, pod.address)
        return pod

    def _pod(self, name: str, spec: Object, command: list[str], env: Mapping[str, str]) -> Pod:
        return Pod(
            name=name,
            spec=spec,
            command=command,
            env=env,
            address=next(self._addresses),
            folder=self._folder / "pods" / name,
            secrets=SECRETS,
            claims=self._folder / "claims",
            names=self._names,
        )


def quick(objects: list[Object]) -> Object:
    """The RayService's Serve configuration with engines that need no weights, and two replicas to lose one of."""
    (rayservice,) = [o for o in objects if o["kind"] == "RayService"]
    config = yaml.safe_load(rayservice["spec"]["serveConfigV2"])
    for application in config["applications"]:
        args = application["args"]
        if "engine" in args:
            pace = {"itl_base_s": 0.04, "itl_per_sequence_s": 0, "prefill_tokens_per_s": None}
            args["engine"] = {"scripted": {"max_sequences": 32, **pace}}
            (pool,) = [d for d in application["deployments"] if d["name"] == "LLMReplica"]
            pool["autoscaling_config"]["min_replicas"] = 2
            pool["max_replicas_per_node"] = 2
        if application["name"] == "retrieval":
            args["embedder"] = {"model": "scripted"}
        if application["name"] == "gateway":
            args["retrieval"] = {"embedding_model": "scripted-embedding"}
    return config


def model_of(config: Object) -> str:
    """The model that a Serve configuration serves."""
    return next(a["args"]["model"] for a in config["applications"] if "engine" in a["args"])


def with_alias(config: Object, alias: str) -> Object:
    """A copy whose gateway also knows its model by another name: a change that restarts nothing."""
    changed = copy.deepcopy(config)
    for application in changed["applications"]:
        if application["name"] == "gateway":
            (gateway,) = application["deployments"]
            gateway["user_config"] = {"aliases": {alias: model_of(config)}}
    return changed


def logs(folder: Path) -> Iterator[tuple[Path, str]]:
    """Every pod's own log, for people."""
    for path in sorted((folder / "pods").glob("*/log")):
        yield path, path.read_text(errors="replace")[-3000:]
