"""What breaks in a run: who is struck, how, and what Serve does about it."""

from __future__ import annotations

import asyncio
from typing import Any

from actors.engines.scripted import ScriptedEngine
from actors.engines.scripted_faults import FaultKind as EngineFaultKind
from actors.engines.scripted_faults import ScriptedFault
from tests.simulation.loop import State
from tests.simulation.plan import Fault, FaultKind
from tests.simulation.world import Server, World, pick

_HEALTH_PERIOD_S, _HEALTH_TIMEOUT_S, _HEALTH_FAILURES = 2.0, 10.0, 3


class Faults:
    """Strikes the processes of a world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._background: list[asyncio.Task[None]] = []

    def strike(self, fault: Fault) -> None:
        """Let it happen, to the one that the seed picks; nothing happens when there is none."""
        victim = self._victim(fault)
        if victim is None:
            return
        self._world.trace(victim.process, "FAULT", fault.kind.value)
        self._world.faults.append(fault.kind)
        match fault.kind:
            case FaultKind.KILL_QUEUE:
                self._world.kill(victim)
                self._world.start_queue(fault.back_after_s)
            case FaultKind.KILL_REPLICA:
                self._world.kill(victim)
                self._world.start_replica(fault.back_after_s)
            case FaultKind.KILL_GATEWAY:
                self._world.kill(victim)
                self._world.loop.call_later(fault.back_after_s, self._world.start_gateway)
            case FaultKind.STOP_REPLICA | FaultKind.STOP_QUEUE:
                victim.process.state = State.STOPPED
                self._world.loop.call_later(fault.lasts_s, self._world.loop.resume, victim.process)
                self._supervise(victim, fault)
            case FaultKind.CUT_BUS:
                pick(self._world.network.streams("bus"), fault.pick).break_alone()
            case FaultKind.CUT_GRANTS:
                pick(self._world.network.streams("grants"), fault.pick).break_alone()
            case FaultKind.DRAIN_REPLICA:
                self._drain(victim, fault)
            case FaultKind.CRASH_ENGINE | FaultKind.HANG_ENGINE:
                self._break_engine(victim, fault)

    def _victim(self, fault: Fault) -> Any:
        match fault.kind:
            case FaultKind.KILL_QUEUE | FaultKind.STOP_QUEUE:
                return self._world.network.queue
            case FaultKind.KILL_GATEWAY:
                return pick(self._world.alive(self._world.gateways), fault.pick)
            case FaultKind.CUT_BUS | FaultKind.CUT_GRANTS:
                method = "bus" if fault.kind is FaultKind.CUT_BUS else "grants"
                call = pick(self._world.network.streams(method), fault.pick)
                return call.server if call is not None else None
            case _:
                able = [s for s in self._world.alive(self._world.replicas) if not s.draining]
                return pick(able, fault.pick)

    def _drain(self, server: Server, fault: Fault) -> None:
        server.draining = True
        self._world.tell_routers()
        self._world.start_replica(fault.back_after_s)
        self._world.loop.call_later(1.0, self._end_drain, server)

    def _end_drain(self, server: Server) -> None:
        if server.process.state is State.DEAD:
            return
        busy = any(call.server is server for call in self._world.network.open)
        if busy or any(
            self._world.knows(gateway.process, server.process.name)
            for gateway in self._world.alive(self._world.gateways)
        ):
            self._world.loop.call_later(0.2, self._end_drain, server)
        else:
            self._world.trace(server.process, "has drained")
            self._world.kill(server)

    def _break_engine(self, server: Server, fault: Fault) -> None:
        engine: ScriptedEngine = server.actor._engine
        kind = EngineFaultKind.CRASH if fault.kind is FaultKind.CRASH_ENGINE else EngineFaultKind.HANG
        after_tokens = round(fault.pick * 97) % 6
        if engine._loop is not None and engine._loop.failure is None:
            engine.inject(ScriptedFault(kind=kind, after_tokens=after_tokens))
        self._supervise(server, fault)

    def _supervise(self, server: Server, fault: Fault) -> None:
        """Serve's health check, for one that has been struck."""
        self._background.append(self._world.loop.create_task(self._health(server, fault)))

    async def _health(self, server: Server, fault: Fault) -> None:
        failures = 0
        while server.process.state is not State.DEAD:
            await asyncio.sleep(_HEALTH_PERIOD_S)
            check = self._world.loop.create_task(self._check(server), context=server.process.context)
            done, _ = await asyncio.wait([check], timeout=_HEALTH_TIMEOUT_S)
            failures = 0 if done and check.exception() is None else failures + 1
            if failures == _HEALTH_FAILURES and server.process.state is not State.DEAD:
                self._world.trace(server.process, "fails its health checks")
                self._world.kill(server)
                if server not in self._world.replicas:
                    self._world.start_queue(fault.back_after_s)
                elif not server.draining:
                    self._world.start_replica(fault.back_after_s)

    async def _check(self, server: Server) -> None:
        if server in self._world.replicas:
            await server.actor.check_health()
