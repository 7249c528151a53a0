"""Says on standard output, once, that everything runs and how to call it.

Started with the application by `build_api`; does something only where the gateway's `announce_url` is set, as in
configs/local.yaml, whose user looks at the terminal of `serve run`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI

from actors.errors import Unavailable
from app.api.deps import GatewayService, gateway_of

_POLL_S = 0.5

_TEXT = """
Shoal is ready at {url}
  models: {models}
  try:    curl -N {url}/v1/chat/completions -H 'content-type: application/json' \\
            -d '{{"model": "{model}", "stream": true, "messages": [{{"role": "user", "content": "Hello!"}}]}}'
  or:     openai.OpenAI(base_url="{url}/v1", api_key="none")
  docs:   shoal ingest DIR --store NAME, then: shoal ask "..." --store NAME
"""


@asynccontextmanager
async def announcing(app: FastAPI) -> AsyncIterator[None]:
    """Lifespan of the application."""
    task = asyncio.create_task(_announce(app))
    yield
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def _announce(app: FastAPI) -> None:
    gateway = await _gateway(app)
    url = gateway.config.announce_url
    if url is None:
        return
    while any(state != "ready" for state in (await gateway.ready()).values()):  # noqa: ASYNC110  Serve has no event
        await asyncio.sleep(_POLL_S)
    names = [card.name for card in await gateway.models()]
    print(_TEXT.format(url=url, models=", ".join(names), model=names[0]), flush=True)  # noqa: T201  it is the point


async def _gateway(app: FastAPI) -> GatewayService:
    """The gateway, which is there soon after the application's start-up."""
    while True:
        try:
            return gateway_of(app)
        except Unavailable:
            await asyncio.sleep(_POLL_S)
