"""`ReadyGate`: an application that runs only once the nodes of its cluster take traffic.

KubeRay moves the selector of a service to a new cluster when all of its Serve applications run, and a worker pod
becomes an endpoint when its readiness probe has next seen a healthy proxy: seconds later. With the head excluded
from the service, nobody answers in between. This actor closes the gap: its constructor returns when enough nodes
beside the head have answered that probe for longer than the probe takes to notice, so "all applications run"
means "there are endpoints". Bound by `app.main`; nobody calls it afterwards.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import httpx
import ray
from pydantic import BaseModel, ConfigDict, Field

from actors import telemetry
from actors.policies.steadiness import Steadiness

_HEAD_RESOURCE = "node:__internal_head__"  # Ray's own mark
_PROBE_S = 0.5
_PROBE_TIMEOUT_S = 2.0
_log = telemetry.logger("ready_gate")


class ReadyGateConfig(BaseModel):
    """When a cluster counts as ready for the traffic of another one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    nodes: int = Field(ge=1, description="Nodes beside the head whose proxy must answer.")
    hold_s: float = Field(
        default=10,
        ge=0,
        description="For how long, without a break. Above the period and time-out of the pods' readiness probe.",
    )
    port: int = Field(default=8000, ge=1, le=65535, description="The proxies' HTTP port.")


class ReadyGate:
    """Returns from its constructor when the cluster takes traffic; until then its application is DEPLOYING.

    Args:
        config: see `ReadyGateConfig`.
    """

    async def __init__(self, config: ReadyGateConfig) -> None:  # type: ignore[misc]
        telemetry.configure_logging()
        waited_s = await wait_until_ready(config, worker_addresses, answers)
        _log.info("cluster_ready", nodes=config.nodes, waited_s=round(waited_s, 1))


async def wait_until_ready(
    config: ReadyGateConfig,
    addresses: Callable[[], list[str]],
    healthy: Callable[[str, int], Awaitable[bool]],
) -> float:
    """Wait for `config.nodes` nodes that are healthy for `config.hold_s`; never gives up.

    Args:
        config: what is waited for.
        addresses: the nodes that there are now; may block.
        healthy: asks one node's proxy.

    Returns:
        Seconds waited.
    """
    began = time.monotonic()
    steadiness = Steadiness(hold_s=config.hold_s)
    while True:
        nodes = await asyncio.to_thread(addresses)
        seen = await asyncio.gather(*(healthy(node, config.port) for node in nodes))
        now = time.monotonic()
        steadiness.saw({node for node, well in zip(nodes, seen, strict=True) if well}, now)
        if len(steadiness.steady(now)) >= config.nodes:
            return now - began
        await asyncio.sleep(_PROBE_S)


def worker_addresses() -> list[str]:
    """Addresses of all nodes of this cluster but the head."""
    return [
        node["NodeManagerAddress"]
        for node in ray.nodes()
        if node["Alive"] and _HEAD_RESOURCE not in node["Resources"]
    ]


async def answers(address: str, port: int) -> bool:
    """Does a node's proxy answer what its pod's readiness probe asks?"""
    try:
        async with httpx.AsyncClient(timeout=_PROBE_TIMEOUT_S, trust_env=False) as client:
            return (await client.get(f"http://{address}:{port}/-/healthz")).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False
