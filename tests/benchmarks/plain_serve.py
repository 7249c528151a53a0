"""The baseline of the saturation benchmark: a slot pool behind Serve's own router, nothing else."""

import asyncio
from typing import Any

from ray import serve


@serve.deployment(ray_actor_options={"num_cpus": 0.1})
class Slots:
    """Holds a slot for 0.1 s; `max_ongoing_requests` is the number of slots."""

    async def run(self) -> str:
        await asyncio.sleep(0.1)
        return "done"


@serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0.1})
class Front:
    """Takes HTTP and waits for a slot, as an application on Serve does."""

    def __init__(self, slots: Any) -> None:
        self._slots = slots

    async def __call__(self, _: Any) -> str:
        return await self._slots.run.remote()


app = Front.bind(Slots.bind())
