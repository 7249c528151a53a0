"""Callers of the service while pods come and go: an open loop, each to an endpoint of its own."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass
from typing import Self

from tests.chaos.load import ask
from tests.chaos.outcomes import Call, Outcome
from tests.kuberay.world import World

TOKENS = 25  # of each answer: a second of the engine
_RATE_RPS = 6.0
_PORT = 8000


@dataclass(kw_only=True)
class Endpoint:
    """What `ask` takes for a system: where one call goes."""

    world: World
    pod: str = ""

    @property
    def http(self) -> str:
        probed = self.world.endpoint()
        self.pod = probed.pod.name
        return f"http://{probed.pod.address}:{_PORT}"


class Traffic:
    """Streams and whole answers by turns; use as an async context, its end waits for the last answer."""

    def __init__(self, world: World, api_key: str, model: str) -> None:
        self._world = world
        self._fields = {"headers": {"authorization": f"Bearer {api_key}"}, "model": model}
        self.calls: list[Call] = []
        self._tasks: list[asyncio.Task[Call]] = []

    async def __aenter__(self) -> Self:
        self._arrivals = asyncio.create_task(self._arrive())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._arrivals.cancel()
        await asyncio.gather(*self._tasks)

    async def _arrive(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        for number in itertools.count():
            call = Call(number, loop.time())
            self.calls.append(call)
            endpoint = Endpoint(world=self._world)
            self._tasks.append(asyncio.create_task(self._one(endpoint, call, stream=number % 3 != 0)))
            due += 1 / _RATE_RPS
            await asyncio.sleep(max(due - loop.time(), 0))

    async def _one(self, endpoint: Endpoint, call: Call, *, stream: bool) -> Call:
        await ask(endpoint, TOKENS, stream=stream, call=call, **self._fields)  # type: ignore[arg-type]
        call.label = endpoint.pod
        return call


def failed(calls: list[Call]) -> list[Call]:
    """Those that were not answered in full."""
    return [call for call in calls if call.outcome is not Outcome.OK]
