"""Which models are deployed: found by name at run time, so that adding one restarts nothing.

A model is a Serve application with a `BatchingQueue`; its name is the application's. `ModelDirectory` asks
the controller every few seconds and on a name it does not know, and keeps the last answer while that
one is away. It owns the `ModelClient` of every model of this gateway.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace
from typing import Any

from ray import serve
from ray.serve.schema import ApplicationStatus

from actors import telemetry
from actors.errors import ModelNotFound, Unavailable
from actors.handles.call import detached
from actors.handles.model import ModelClient
from actors.handles.queue import QUEUE_DEPLOYMENT
from actors.types import ModelCard

_REFRESH_S = 5.0
_REFRESH_TIMEOUT_S = 5.0
_REFRESH_ON_MISS_S = 0.5  # an unknown name asks again, but not more often than this
_log = telemetry.logger("model_directory")


@dataclass(frozen=True, kw_only=True, slots=True)
class Application:
    """A Serve application as the controller knows it."""

    name: str
    deployed_at: int  # unix seconds
    status: str  # "RUNNING" when every deployment has what it should have
    is_model: bool
    rebuilding: bool = False  # the controller lists none of its deployments: new arguments are being deployed


class ModelDirectory:
    """All deployed models.

    Args:
        gateway_id: this gateway replica.
    """

    def __init__(self, gateway_id: str) -> None:
        self._gateway_id = gateway_id
        self._applications: list[Application] = []
        self._deployed: dict[str, Application] = {}  # models
        self._clients: dict[str, ModelClient] = {}
        self._refreshed_at = float("-inf")
        self._refreshing = asyncio.Lock()
        self._looking: asyncio.Task[None] | None = None

    async def find(self, name: str) -> ModelClient:
        """The client of one model.

        Raises:
            ModelNotFound: no model of that name is deployed; the message lists those that are.
            Unavailable: it is being deployed, and this gateway has not met it before.
        """
        if name not in self._deployed:
            await self._refresh(_REFRESH_ON_MISS_S)
        elif time.monotonic() - self._refreshed_at > _REFRESH_S:
            self._look(_REFRESH_S)  # beside the request: a controller that is slow or away holds nobody up
        if name not in self._deployed:
            if any(app.name == name and app.rebuilding for app in self._applications):
                raise Unavailable(f"the model {name!r} is being deployed", retry_after_s=1.0)
            known = ", ".join(sorted(self._deployed)) or "none"
            raise ModelNotFound(f"the model {name!r} does not exist; available: {known}", param="model")
        return self._client(name)

    def card(self, model: Application) -> ModelCard:
        """What is known of a model here; its context length only once it was called."""
        client = self._clients.get(model.name)
        known = client.card if client is not None else None
        return replace(
            known or ModelCard(name=model.name, context_tokens=0, tokenizer=""), created_at=model.deployed_at
        )

    async def models(self) -> list[Application]:
        """All models, by name."""
        await self._refresh(_REFRESH_ON_MISS_S)
        return [self._deployed[name] for name in sorted(self._deployed)]

    async def applications(self) -> list[Application]:
        """All applications of the cluster, models or not."""
        await self._refresh(_REFRESH_ON_MISS_S)
        return self._applications

    async def close(self) -> None:
        """End all connections."""
        clients, self._clients = list(self._clients.values()), {}
        await asyncio.gather(*(client.close() for client in clients))

    def _client(self, name: str) -> ModelClient:
        client = self._clients.get(name)
        if client is None:
            client = self._clients[name] = ModelClient(name, self._gateway_id, self._queue_lost)
        return client

    def _queue_lost(self) -> None:
        """Look whether the model was removed: those who wait for it must not wait until their deadline."""
        self._look(_REFRESH_ON_MISS_S)

    def _look(self, older_than_s: float) -> None:
        if self._looking is None or self._looking.done():
            self._looking = detached(self._refresh(older_than_s))

    async def _refresh(self, older_than_s: float) -> None:
        async with self._refreshing:
            if time.monotonic() - self._refreshed_at < older_than_s:
                return
            try:
                async with asyncio.timeout(_REFRESH_TIMEOUT_S):
                    found = await asyncio.to_thread(_applications)
            except Exception as error:  # the controller is away: the last answer stays good
                _log.warning("controller_unreachable", error=type(error).__name__)
            else:
                self._applications = found
                kept = {app.name for app in found if app.rebuilding} & set(self._deployed)
                models = {app.name: app for app in found if app.is_model}
                await self._replace({name: self._deployed[name] for name in kept} | models)
            self._refreshed_at = time.monotonic()

    async def _replace(self, deployed: dict[str, Application]) -> None:
        before, self._deployed = (
            self._deployed,
            deployed,
        )  # first: no client of a removed one is made any more
        for name in set(before) - set(deployed):
            client = self._clients.pop(name, None)
            if client is not None:
                await client.close()
            _log.info("model_removed", model=name)
        for name in set(deployed) - set(before):
            _log.info("model_found", model=name)


def _applications() -> list[Application]:
    return [_application(name, app) for name, app in serve.status().applications.items()]


def _application(name: str, app: Any) -> Application:
    leaving = app.status == ApplicationStatus.DELETING
    return Application(
        name=name,
        deployed_at=int(app.last_deployed_time_s),
        status=str(app.status.value),
        is_model=QUEUE_DEPLOYMENT in app.deployments and not leaving,
        rebuilding=not app.deployments and not leaving,
    )
