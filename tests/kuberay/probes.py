"""The kubelet's part: probes of a pod at their periods, and whether it is Ready."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from tests.kuberay.pods import Pod

Object = dict[str, Any]


class Probed:
    """Probes one pod until it is closed: startup first, then readiness and liveness side by side."""

    def __init__(self, pod: Pod) -> None:
        self.pod = pod
        self.started = False
        self.ready = False
        self.liveness_failures = 0  # in a row
        self.killed = False  # by its liveness or startup probe
        self._tasks = [asyncio.create_task(self._run())]

    def close(self) -> None:
        """Stop probing; a pod that is gone is not Ready."""
        self.ready = False
        for task in self._tasks:
            task.cancel()

    async def _run(self) -> None:
        probes = self.pod.container
        if "startupProbe" in probes:
            failures = 0
            while not await self._ask(probes["startupProbe"]):
                failures += 1
                self.killed = failures >= probes["startupProbe"].get("failureThreshold", 3)
                await asyncio.sleep(probes["startupProbe"].get("periodSeconds", 10))
        self.started = True
        self._tasks.append(asyncio.create_task(self._readiness(probes["readinessProbe"])))
        if "livenessProbe" in probes:
            self._tasks.append(asyncio.create_task(self._liveness(probes["livenessProbe"])))

    async def _readiness(self, probe: Object) -> None:
        failures = 0
        while True:
            failures = 0 if await self._ask(probe) else failures + 1
            if failures == 0:
                self.ready = True
            elif failures >= probe.get("failureThreshold", 3):
                self.ready = False
            await asyncio.sleep(probe.get("periodSeconds", 10))

    async def _liveness(self, probe: Object) -> None:
        while True:
            self.liveness_failures = 0 if await self._ask(probe) else self.liveness_failures + 1
            self.killed |= self.liveness_failures >= probe.get("failureThreshold", 3)
            await asyncio.sleep(probe.get("periodSeconds", 10))

    async def _ask(self, probe: Object) -> bool:
        timeout_s = probe.get("timeoutSeconds", 1)
        if "exec" in probe:
            try:
                await asyncio.to_thread(self.pod.exec, *probe["exec"]["command"], timeout_s=timeout_s)
            except Exception:  # whatever goes wrong is a failed probe
                return False
            return True
        port = probe["httpGet"]["port"]
        ports = {p["name"]: p["containerPort"] for p in self.pod.container["ports"]}
        url = f"http://{self.pod.address}:{ports.get(port, port)}{probe['httpGet']['path']}"
        try:
            async with httpx.AsyncClient(timeout=timeout_s, trust_env=False) as client:
                return 200 <= (await client.get(url)).status_code < 400
        except httpx.HTTPError:
            return False
