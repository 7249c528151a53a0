"""Durable work beside a fault: documents that are attached one after the other, and what became of them."""

import asyncio
from contextlib import suppress
from typing import Self

import openai

from tests.conftest import System

_PAUSE_S = 0.5
_INGESTED_S = 60


class Uploads:
    """Attaches small documents to a vector store until its context ends.

    Attributes:
        acknowledged: ids of the files whose ingestion was accepted.
    """

    def __init__(self, system: System) -> None:
        self._client = system.client()
        self.acknowledged: list[str] = []

    async def lost(self) -> list[str]:
        """Acknowledged files that did not end searchable."""
        waiting = set(self.acknowledged)
        try:
            async with asyncio.timeout(_INGESTED_S):
                while waiting:
                    for file_id in sorted(waiting):
                        with suppress(openai.APIError):
                            found = await self._client.vector_stores.files.retrieve(
                                file_id, vector_store_id=self._store
                            )
                            if found.status == "completed":
                                waiting.discard(file_id)
                    await asyncio.sleep(0.3)
        except TimeoutError:
            pass  # those are the lost ones
        await self._client.close()
        return sorted(waiting)

    async def _attach(self) -> None:
        number = 0
        while True:
            number += 1
            name, text = f"{number}.txt", f"Fact number {number} is written down here."
            with suppress(openai.APIError):  # not acknowledged: nothing was promised
                file = await self._client.files.create(file=(name, text.encode()), purpose="assistants")
                await self._client.vector_stores.files.create(self._store, file_id=file.id)
                self.acknowledged.append(file.id)
            await asyncio.sleep(_PAUSE_S)

    async def __aenter__(self) -> Self:
        self._store = (await self._client.vector_stores.create(name="chaos")).id
        self._work = asyncio.create_task(self._attach())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._work.cancel()
        await asyncio.wait([self._work])
