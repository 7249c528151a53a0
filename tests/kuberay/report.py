"""The manifest-faithful cluster: what the rendered manifests say, run as processes, with faults under traffic.

    python -m tests.kuberay.report [--quick] [--scenes NAMES] [--json FILE] [--keep FOLDER]

Renders overlays/cpu-dev, starts each pod's exact command and environment in namespaces of its own (`pods`), deploys as
the operator does, then: a change of the Serve configuration, a worker killed, the head killed, and a new cluster, all
under traffic. Needs root (namespaces) and ends with status 1 when something did not hold. It starts itself again in
new namespaces, so that nothing of it is left behind. `--quick` is what CI runs: shorter watches, the same faults.

Differences from a cluster: those of `pods`, the engines of `world.quick`, a new head gets the address of the former one
(there, its service has one), and the old cluster of an upgrade stays until the end (there,
`rayClusterDeletionDelaySeconds`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.chaos.outcomes import NEVER, classes
from tests.kuberay.conftest import rendered
from tests.kuberay.traffic import Traffic, failed
from tests.kuberay.world import Cluster, World, logs, model_of, quick, with_alias

SCENES = ("config_update", "worker_killed", "head_killed", "upgrade")
_INSIDE = "SHOAL_FAITHFUL_INSIDE"
_RUNNING_S = 240  # for a cluster to run, on a machine that does other things
_BACK_S = 150  # for a pod to be replaced and everything to run again
_POLL_S = 0.25


class Report:
    """One run, scene by scene; `scenes` is what came out."""

    def __init__(self, world: World, *, watch_s: float, chosen: Sequence[str]) -> None:
        self._world = world
        self._chosen = chosen
        self._watch_s = watch_s  # of undisturbed traffic around each fault
        self.scenes: dict[str, dict[str, Any]] = {}
        self._key = ""

    async def run(self) -> None:
        """All scenes."""
        began = time.monotonic()
        await self._until(lambda: self._world.active is not None, _RUNNING_S, "the first cluster runs")
        self.scenes["start"] = {
            "running_s": time.monotonic() - began,
            "endpoints_at_switch": self._world.endpoints_at_switch[0],
        }
        worker = self._world.endpoint().pod
        create = 'shoal keys create --tenant t --redis-url "$SHOAL_REDIS_URL" --pepper-file /etc/shoal/pepper/pepper'
        self._key = (await asyncio.to_thread(worker.exec, "bash", "-c", create)).strip()
        for name in self._chosen:
            scene = getattr(self, f"_{name}")
            async with Traffic(self._world, self._key, self._model()) as traffic:
                await asyncio.sleep(self._watch_s / 2)
                facts = await scene(traffic)
                await asyncio.sleep(self._watch_s / 2)
            self.scenes[name] = facts | self._callers(traffic)
            print(name, json.dumps(self.scenes[name]), file=sys.stderr, flush=True)

    async def _config_update(self, _: Traffic) -> dict[str, Any]:
        began = time.monotonic()
        await self._learn_alias("other-name")
        return {"known_s": time.monotonic() - began}

    async def _worker_killed(self, traffic: Traffic) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        victim = self._world.endpoint().pod
        victim.kill()
        killed = loop.time()
        await self._until(lambda: len(self._world.endpoints()) < 2, _BACK_S, "the dead pod is no endpoint")
        gone_s = loop.time() - killed
        await self._until(lambda: len(self._world.endpoints()) == 2, _BACK_S, "the pod is replaced")
        back_s = loop.time() - killed
        hurt = failed(traffic.calls)
        # Whoever was connected through the dead pod, or came before the service knew; nobody else.
        others = [c for c in hurt if c.ended_at and c.started_at > killed + gone_s]
        return {"no_endpoint_after_s": gone_s, "back_s": back_s, "failed_later": len(others)}

    async def _head_killed(self, _: Traffic) -> dict[str, Any]:
        cluster = self._world.active
        assert cluster is not None
        first = cluster.pods["head"]
        before = await asyncio.to_thread(self._replicas, cluster)
        first.pod.kill()
        began = time.monotonic()

        def back() -> bool:
            head = cluster.pods.get("head")  # between two heads there is none
            return head is not None and head is not first and head.ready

        await self._until(back, _BACK_S, "a new head is Ready")
        ready_s = time.monotonic() - began
        await asyncio.sleep(self._watch_s)
        # It remembers everything: no replica is replaced, and changes are taken again.
        await self._until_runs()
        runs_s = time.monotonic() - began
        after = await asyncio.to_thread(self._replicas, cluster)
        await self._learn_alias("after-the-head")
        return {"ready_s": ready_s, "runs_s": runs_s, "replaced": sorted(before - after)}

    def _replicas(self, cluster: Cluster) -> set[str]:
        """All replicas that run, but the pools that follow the load."""
        applications = self._world.dashboard(cluster).details()
        return {
            f"{name}#{replica['replica_id']}"
            for app in applications.values()
            for name, deployment in app["deployments"].items()
            for replica in deployment["replicas"]
            if name in {"Gateway", "BatchingQueue", "ReadyGate"} and replica["state"] == "RUNNING"
        }

    async def _upgrade(self, _: Traffic) -> dict[str, Any]:
        empty_s = self._world.without_endpoint_s
        before = self._world.active
        began = time.monotonic()
        self._world.apply_cluster({"SHOAL_REVISION": "2"})
        await self._until(lambda: self._world.active is not before, _RUNNING_S, "the new cluster is active")
        switched_s = time.monotonic() - began
        await asyncio.sleep(self._watch_s)
        return {
            "switched_s": switched_s,
            "endpoints_at_switch": self._world.endpoints_at_switch[-1],
            "without_endpoint_s": self._world.without_endpoint_s - empty_s,
        }

    def _model(self) -> str:
        assert self._world.active is not None
        return model_of(self._world.active.config)

    def _callers(self, traffic: Traffic) -> dict[str, Any]:
        hurt = failed(traffic.calls)
        return {
            "callers": dict(classes(traffic.calls)),
            "failed": len(hurt),
            "never": sum(call.outcome in NEVER for call in hurt),
            "examples": [f"{call.label} {call.outcome}: {call.detail}" for call in hurt[:5]],
            "longest_gap_s": max((call.longest_gap_s for call in traffic.calls), default=0.0),
        }

    async def _learn_alias(self, alias: str) -> None:
        """Change the configuration and wait until the gateways answer by it."""
        cluster = self._world.active
        assert cluster is not None
        self._world.apply_config(with_alias(cluster.config, alias))
        while True:
            async with Traffic(self._world, self._key, alias) as few:
                await asyncio.sleep(0.5)
            if not failed(few.calls):
                return
            if not self._world.endpoints():
                raise AssertionError("no endpoint")
            await asyncio.sleep(_POLL_S)

    async def _until_runs(self) -> None:
        cluster = self._world.active
        assert cluster is not None
        deadline = time.monotonic() + _BACK_S
        while set((await asyncio.to_thread(self._world.dashboard(cluster).statuses)).values()) != {"RUNNING"}:
            assert time.monotonic() < deadline, "the applications do not run again"
            await asyncio.sleep(_POLL_S)

    async def _until(self, holds: Callable[[], bool], timeout_s: float, what: str) -> None:
        deadline = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
            await asyncio.sleep(_POLL_S)


async def inside(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The run, in namespaces of its own."""
    objects = list(yaml.safe_load_all(rendered("overlays/cpu-dev")))
    world = World(folder, objects, quick(objects))
    async with world:
        report = Report(world, watch_s=4 if options.quick else 30, chosen=options.scenes.split(","))
        began = time.monotonic()
        try:
            await report.run()
        except BaseException:
            for path, text in logs(folder):
                print(f"--- {path}\n{text}", file=sys.stderr)
            for cluster in (world.active, world.pending):
                if cluster is not None and "head" in cluster.pods:
                    print(cluster.name, world.dashboard(cluster).statuses(), file=sys.stderr)
            raise
        return {"scenes": report.scenes, "took_s": time.monotonic() - began}


def main() -> int:
    """Run it and print what came out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="shorter watches, as CI runs it")
    parser.add_argument("--scenes", default=",".join(SCENES), help="some of them, with commas")
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--keep", type=Path, help="a new folder for the pods' logs and volumes, kept")
    options = parser.parse_args()
    if unknown := set(options.scenes.split(",")) - set(SCENES):
        parser.error(f"no such scenes: {', '.join(sorted(unknown))}; there are {', '.join(SCENES)}")
    if os.environ.get(_INSIDE) != "1":
        namespaces = ["--net", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
        again = [sys.executable, "-m", "tests.kuberay.report", *sys.argv[1:]]
        os.execvpe("unshare", ["unshare", *namespaces, *again], {**os.environ, _INSIDE: "1"})  # noqa: S606  no shell wanted
    if options.keep:
        options.keep.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="shoal-pods-", ignore_cleanup_errors=True) as temporary:
        result = asyncio.run(inside(options, options.keep or Path(temporary)))
    text = json.dumps(result, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
