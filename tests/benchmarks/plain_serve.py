"""The baseline of the saturation and overload benchmarks: a slot pool behind Serve's own router, nothing else."""

import asyncio
from typing import Any

from ray import serve
from starlette.requests import Request


@serve.deployment(ray_actor_options={"num_cpus": 0.1})
class Slots:
    """Holds a slot for as long as it is told; `max_ongoing_requests` is the number of slots."""

    async def run(self, service_s: float, text: str) -> str:
        await asyncio.sleep(service_s)
        return text


@serve.deployment(max_ongoing_requests=100_000, ray_actor_options={"num_cpus": 0.1})
class Front:
    """Takes HTTP and waits for a slot, as an application on Serve does."""

    def __init__(self, slots: Any) -> None:
        self._slots = slots

    async def __call__(self, request: Request) -> str:
        asked = await request.json()
        return await self._slots.run.remote(asked["service_s"], asked["text"])


app = Front.bind(Slots.bind())


def application(name: str, slots: int, **options: Any) -> dict[str, Any]:
    """Its entry in a Serve config; it answers at `/NAME`.

    Args:
        name: of the application.
        slots: how many requests run at once.
        options: of the slots' deployment, as in a Serve config.
    """
    pool = {"name": "Slots", "max_ongoing_requests": slots, **options}
    return {
        "name": name,
        "route_prefix": f"/{name}",
        "import_path": "tests.benchmarks.plain_serve:app",
        "deployments": [{"name": "Front"}, pool],
    }


# The back-off of its router, in YAML's terms, as far down as it helps.
TUNED = {"request_router_config": {"initial_backoff_s": 0.002, "max_backoff_s": 0.02}}
