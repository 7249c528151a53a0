"""An engine on a share of a GPU that holds: leased in bytes, started alone, checked, asleep when others need the room.

`SharedCardEngine` is an `LLMEngine` around another one, which `LLMReplica` makes where a config has `share`. It takes
a lease from the node's ledger, starts the engine under the card's start lease with the KV cache that its share
leaves, and holds the process tree to the lease before it is ready. It sleeps when a neighbour waits for its bytes and
wakes with the next request; a dead engine is started again as `policies.containment` says.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace

from actors import telemetry
from actors.engines.gpu_cards import Cards
from actors.engines.gpu_ledger import GpuLedger
from actors.engines.gpu_start import CardStart, Plan, ShareConfig, SleepingEngine
from actors.engines.protocol import EngineCapacity, EngineStats
from actors.errors import EngineFailed, Unavailable
from actors.policies.containment import Quarantine, after_death
from actors.policies.gpu_memory import MIB, Lease, budget_bytes
from actors.types import GenerationRequest, ModelCard, TokenDelta

_LOOK_S = 0.1  # between two looks at the ledger
_log = telemetry.logger("gpu_share")


class SharedCardEngine:
    """One engine on a share of the card that this process was given.

    Args:
        owner: names the lease; the replica.
        num_gpus: the share, above 0 and at most 1.
        make: makes the engine, not started.
        key: of what the engine takes beside its KV cache: model, revision, configuration.
        cards: the driver.
        config: see `ShareConfig`.
    """

    def __init__(  # noqa: PLR0913  what it is made of, each once
        self,
        *,
        owner: str,
        num_gpus: float,
        make: Callable[[Plan], SleepingEngine],
        key: str,
        cards: Cards,
        config: ShareConfig,
    ) -> None:
        self._owner = owner
        self._num_gpus = num_gpus
        self._cards = cards
        self._config = config
        self._ledger = GpuLedger(config.folder.expanduser())
        self._starter = CardStart(make=make, key=key, cards=cards, ledger=self._ledger, config=config)
        self._engine: SleepingEngine | None = None
        self._lease: Lease | None = None
        self._running = 0
        self._changing = asyncio.Lock()  # of READY to ASLEEP and back
        self._deaths: list[float] = []
        self._watching: asyncio.Task[None] | None = None
        self.quarantined = False

    async def start(self) -> ModelCard:
        """Lease, start alone, check; see `LLMEngine.start`.

        Raises:
            EngineFailed: the card has no room, the model does not fit its share, or the engine does not keep to it.
        """
        await self.stop()
        return await self._start(batch_share=1.0)

    @property
    def asleep(self) -> bool:
        """Whether its memory is given to others; the next request wakes it."""
        return self._lease is not None and self._lease.state == "asleep"

    @property
    def capacity(self) -> EngineCapacity:
        """The engine's."""
        return self._started().capacity

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        """Run one request, waking the engine for it; see `LLMEngine.generate`.

        Raises:
            Unavailable: the engine sleeps, and its neighbours work for too long to leave it room.
        """
        self._running += 1
        try:
            await self._awake()
            async with aclosing(self._started().generate(request)) as deltas:  # type: ignore[type-var]
                async for delta in deltas:
                    yield delta
        finally:
            self._running -= 1
            if not self._running:
                await self._say_idle()

    async def abort(self, request_id: str) -> None:
        """Stop a request."""
        await self._started().abort(request_id)

    def stats(self) -> EngineStats:
        """The engine's."""
        return self._started().stats()

    async def check_health(self) -> None:
        """Return when the engine makes progress; one that sleeps is well."""
        if not self.asleep:
            await self._started().check_health()

    async def stop(self) -> None:
        """End the engine and give the lease back; safe to call twice."""
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None
        engine, self._engine = self._engine, None
        if engine is not None:
            await engine.stop()
        self._lease = None
        await asyncio.to_thread(self._ledger.release, self._owner)

    async def recover(self) -> bool:
        """Start a dead engine again: wait until its memory is free and the back-off is over.

        Returns:
            False when it has died too often: it is quarantined and its lease is given back.
        """
        now = time.monotonic()
        self._deaths.append(now)
        decision = after_death(self._deaths, now)
        card = self._cards.mine()
        before = self._lease.size_bytes if self._lease else 0
        await self.stop()
        if isinstance(decision, Quarantine):
            self.quarantined = True
            _log.error("engine_quarantined", owner=self._owner, deaths=len(self._deaths))
            return False
        await asyncio.sleep(decision.after_s)
        await self._starter.memory_is_free(card, before)
        await self._start(batch_share=decision.batch_share)
        _log.info("engine_recovered", owner=self._owner, batch_share=decision.batch_share)
        return True

    # --- starting -----------------------------------------------------------------------------------------------

    async def _start(self, *, batch_share: float) -> ModelCard:
        card = self._cards.mine()
        budget = budget_bytes(self._num_gpus, card)
        lease = Lease(owner=self._owner, card=card.uuid, size_bytes=budget)
        await asyncio.to_thread(self._ledger.take, lease, card)
        self._lease = lease
        try:
            self._engine, model = await self._starter.start(card, budget, batch_share)
        except BaseException:
            await self.stop()
            raise
        await self._say_idle()
        self._watching = asyncio.get_running_loop().create_task(self._sleep_when_asked())
        return model

    # --- READY and ASLEEP -----------------------------------------------------------------------------------------

    async def _awake(self) -> None:
        """Be READY and marked as working.

        Raises:
            Unavailable: no room in time.
        """
        if self._lease is not None and self._lease.state == "ready" and self._lease.idle_since is None:
            return
        async with self._changing:
            lease = self._held()
            if lease.state == "asleep":
                await self._take_room(replace(lease, state="ready", idle_since=None, asked_to_sleep=False))
                began = time.monotonic()
                await self._started().wake()
                _log.info("engine_woken", owner=self._owner, took_s=round(time.monotonic() - began, 3))
            elif lease.idle_since is not None:
                await self._write(replace(lease, idle_since=None, asked_to_sleep=False))

    async def _take_room(self, lease: Lease) -> None:
        card = self._cards.mine()
        deadline = time.monotonic() + self._config.wake_timeout_s
        while True:
            try:
                await self._write(lease)
            except EngineFailed:
                await asyncio.to_thread(self._ledger.ask_to_sleep, card, lease.size_bytes, self._owner)
            else:
                return
            if time.monotonic() > deadline:
                raise Unavailable("the other models on this GPU are at work", retry_after_s=1.0)
            await asyncio.sleep(_LOOK_S)

    async def _say_idle(self) -> None:
        async with self._changing:
            if self._lease is not None and not self._running and self._lease.state == "ready":
                await self._write(replace(self._lease, idle_since=time.monotonic()))

    async def _sleep_when_asked(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                await self._sleep_if_asked()
            except Exception:  # a watch that has ended would hold its bytes for ever
                _log.exception("sleep_failed", owner=self._owner)

    async def _sleep_if_asked(self) -> None:
        seen = await asyncio.to_thread(self._ledger.mine, self._owner)
        if seen is None or not seen.asked_to_sleep:
            return
        async with self._changing:
            lease = self._held()
            if self._running or lease.state == "asleep":
                return
            card = self._cards.mine()
            before = self._cards.used_bytes(card)
            await self._started().sleep()
            freed = max(before - self._cards.used_bytes(card), 0)
            asleep_bytes = max(lease.size_bytes - freed, 0)
            await self._write(replace(lease, state="asleep", asleep_bytes=asleep_bytes, asked_to_sleep=False))
            _log.info("engine_asleep", owner=self._owner, keeps_mib=asleep_bytes // MIB)

    async def _write(self, lease: Lease) -> None:
        """Change the lease in the ledger, then here."""
        await asyncio.to_thread(self._ledger.take, lease, self._cards.mine())
        self._lease = lease

    def _held(self) -> Lease:
        if self._lease is None:
            raise EngineFailed("the engine is not started")
        return self._lease

    def _started(self) -> SleepingEngine:
        if self._engine is None:
            raise EngineFailed("the engine is not started")
        return self._engine
