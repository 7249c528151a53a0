"""Starting an engine on a share of a card: alone, with the KV cache that the share leaves, held to its lease.

Used by `gpu_share`, which owns the lease and what comes after the start.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil
from pydantic import BaseModel, ConfigDict, Field

from actors import telemetry
from actors.engines.gpu_cards import Cards
from actors.engines.gpu_footprints import Footprints
from actors.engines.gpu_ledger import GpuLedger
from actors.engines.protocol import LLMEngine
from actors.errors import EngineFailed
from actors.policies.gpu_memory import MIB, Card, Footprint, kv_cache_bytes, within
from actors.types import ModelCard

_LOOK_S = 0.1  # between two looks at the card
_log = telemetry.logger("gpu_start")


class ShareConfig(BaseModel):
    """How an engine keeps to its share of a GPU."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: Path = Field(
        default=Path("~/.shoal/gpu"), description="Of the ledger: one for all replicas of a node."
    )
    least_kv_bytes: int = Field(
        default=256 * MIB, ge=MIB, description="A share that leaves less for the KV cache is refused."
    )
    tolerance: float = Field(
        default=0.02, gt=0, lt=1, description="How far from its lease the engine may be when it is started."
    )
    start_timeout_s: float = Field(
        default=900, gt=0, description="How long engines that start on the card are waited for."
    )
    wake_timeout_s: float = Field(
        default=20, gt=0, description="How long a request waits for working neighbours to leave room."
    )


class SleepingEngine(LLMEngine, Protocol):
    """An engine that can give its memory back and take it again in less than a second."""

    async def sleep(self) -> None:
        """Keep the weights in the host's memory and drop the KV cache; nothing may be running."""

    async def wake(self) -> None:
        """Take the memory again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How an engine is to be made."""

    kv_cache_bytes: int
    batch_share: float = 1.0  # of the sequences that it is configured for


class CardStart:
    """Starts engines of one model on a card.

    Args:
        make: makes the engine, not started.
        key: of what the engine takes beside its KV cache: model, revision, configuration.
        cards: the driver.
        ledger: of the node.
        config: see `ShareConfig`.
    """

    def __init__(
        self,
        *,
        make: Callable[[Plan], SleepingEngine],
        key: str,
        cards: Cards,
        ledger: GpuLedger,
        config: ShareConfig,
    ) -> None:
        self._make = make
        self._key = key
        self._cards = cards
        self._ledger = ledger
        self._config = config
        self._footprints = Footprints(config.folder.expanduser() / "footprints")

    async def start(self, card: Card, budget: int, batch_share: float) -> tuple[SleepingEngine, ModelCard]:
        """Start one, alone on the card, and hold it to its lease.

        Args:
            card: where.
            budget: bytes of its lease.
            batch_share: of the sequences that it is configured for.

        Raises:
            EngineFailed: the model does not fit its share, cannot be loaded, or does not keep to the lease; nothing
                of it is left then.
        """
        async with self._starting(card):
            footprint = await self._footprint(card)
            kv_bytes = kv_cache_bytes(budget, footprint, self._config.least_kv_bytes)
            others_bytes = self._cards.used_bytes(card)
            engine = self._make(Plan(kv_cache_bytes=kv_bytes, batch_share=batch_share))
            try:
                model = await engine.start()
                await self._check(card, budget, others_bytes)
            except BaseException:
                await engine.stop()
                raise
        return engine, model

    async def memory_is_free(self, card: Card, wanted_bytes: int) -> None:
        """Until the driver has taken back what a process held that is gone: a start before that would run out."""
        deadline = time.monotonic() + self._config.wake_timeout_s
        while self._cards.used_bytes(card) + wanted_bytes > card.total_bytes:
            if time.monotonic() > deadline:
                return  # the start will say what is wrong
            await asyncio.sleep(_LOOK_S)

    @asynccontextmanager
    async def _starting(self, card: Card) -> AsyncIterator[None]:
        """The start lease, waited for in a thread."""
        lease = self._ledger.starting(card, self._config.start_timeout_s)
        await asyncio.to_thread(lease.__enter__)
        try:
            yield
        finally:
            lease.__exit__(None, None, None)

    async def _footprint(self, card: Card) -> Footprint:
        """What the engine takes beside its KV cache: known, or measured now on a start with the least cache."""
        known = await asyncio.to_thread(self._footprints.find, self._key)
        if known is not None:
            return known
        others_bytes = self._cards.used_bytes(card)
        engine = self._make(Plan(kv_cache_bytes=self._config.least_kv_bytes))
        try:
            await engine.start()
            used = self._used_bytes(card, others_bytes)
        finally:
            await engine.stop()
        await self.memory_is_free(card, used)
        footprint = Footprint(size_bytes=used - self._config.least_kv_bytes)
        await asyncio.to_thread(self._footprints.keep, self._key, footprint)
        _log.info("footprint_measured", mib=footprint.size_bytes // MIB)
        return footprint

    async def _check(self, card: Card, budget: int, others_bytes: int) -> None:
        used = self._used_bytes(card, others_bytes)
        if not within(budget, used, self._config.tolerance):
            await asyncio.to_thread(self._footprints.forget, self._key)
            raise EngineFailed(
                f"the engine uses {used // MIB} MiB of the card and its lease is {budget // MIB}: "
                "what it takes is measured again at the next start"
            )

    def _used_bytes(self, card: Card, others_bytes: int) -> int:
        """What this process and its children use; nobody else starts meanwhile, where the driver cannot tell."""
        tree = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
        used = self._cards.used_by(card, tree)
        return used if used is not None else self._cards.used_bytes(card) - others_bytes
