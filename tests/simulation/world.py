"""The simulated cluster: processes with the real gateways' end, queue and replicas in them."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from actors.batching_queue import BatchingQueue, BatchingQueueConfig
from actors.engines.choice import EngineChoice
from actors.engines.scripted import ScriptedConfig
from actors.handles import frames
from actors.handles.model import ModelClient
from actors.handles.replica_directory import ReplicaDirectory
from actors.llm_replica import LLMReplica
from actors.policies.retry import ATTEMPTS
from tests.simulation.callers import Caller
from tests.simulation.fairness import FairnessWatch
from tests.simulation.loop import Process, State, VirtualLoop, current_process
from tests.simulation.network import Network
from tests.simulation.plan import COSTS_AN_ATTEMPT, Ask, FaultKind, Scenario

MODEL = "m"
_ROUTER_NEWS_S = 0.3  # mean time until a gateway's router hears of a replica's coming or leaving


class Replica(LLMReplica):
    def __del__(self) -> None:
        """Serve awaits the real one; the garbage collector cannot."""


@dataclass(eq=False)
class Server:
    """One incarnation of an actor."""

    process: Process
    actor: Any = None
    draining: bool = False
    watch: FairnessWatch | None = None  # of a queue
    callers: list[Caller] = field(default_factory=list)  # of a gateway


class Directories:
    """In the place of the process-wide `DIRECTORY`: one for each process."""

    def __init__(self) -> None:
        self._of: dict[Process, ReplicaDirectory] = {}

    def of(self, process: Process) -> ReplicaDirectory:
        return self._of.setdefault(process, ReplicaDirectory())

    def subscribe(self, app_name: str, listener: Callable[[frozenset[str]], None]) -> None:
        self.of(current_process()).subscribe(app_name, listener)

    def has_left(self, app_name: str, replica_id: str) -> bool:
        return self.of(current_process()).has_left(app_name, replica_id)


class World:
    """Everything that runs in one run.

    Args:
        loop: the time.
        plan: what is there.
        trace: told what happens, in words.
    """

    def __init__(self, loop: VirtualLoop, plan: Scenario, trace: Callable[..., None]) -> None:
        self.loop, self.plan, self.trace = loop, plan, trace
        self.rng = random.Random(plan.seed)
        self.network = Network(loop, random.Random(plan.seed + 1), plan.latency_s, trace)
        self.network.router = self
        self.network.overtaking = plan.overtaking
        self.network.on_command = self.check_command
        self.directories = Directories()
        self.known: dict[Process, set[str]] = {}  # replicas in each gateway's router
        self.gateways: list[Server] = []
        self.replicas: list[Server] = []
        self.queues: list[Server] = []
        self.callers: list[Caller] = []
        self.faults: list[FaultKind] = []  # that have struck
        self.wrongs: list[str] = []
        self.counts: Counter[str] = Counter()

    def count(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """In the place of `telemetry.count`."""
        self.counts[f"{name} {labels['outcome']}" if "outcome" in labels else name] += round(amount)

    # --- processes come ------------------------------------------------------------------------------

    def start(self) -> None:
        """The first of everything."""
        self.start_queue(0.0)
        for _ in range(self.plan.replicas):
            self.start_replica(self.rng.uniform(0.0, 0.2))
        for _ in range(self.plan.gateways):
            self.start_gateway()

    def start_queue(self, after_s: float) -> None:
        server = Server(Process(f"queue{len(self.queues)}"))
        self.queues.append(server)
        self.loop.call_later(after_s, self._queue_up, server)

    def _queue_up(self, server: Server) -> None:
        self.trace(server.process, "is up")
        config = BatchingQueueConfig(
            look_ahead=self.plan.look_ahead, tenant_weights=dict(self.plan.tenant_weights)
        )
        server.actor = server.process.context.run(BatchingQueue, MODEL, config)
        server.actor._dispatcher.rng = random.Random(self.plan.seed)
        longest = max(ask.words * 4 for ask in self.plan.asks) * 2  # what it has come to is read again
        server.watch = FairnessWatch(server.actor._dispatcher, longest)
        server.process.after_step = lambda: self._check_books(server)
        self.network.queue_is_up(server)

    def start_replica(self, after_s: float) -> None:
        process = Process(f"replica{len(self.replicas)}")
        server = Server(process)
        self.replicas.append(server)
        self.loop.call_later(
            after_s, lambda: self.loop.create_task(self._replica_up(server), context=process.context)
        )

    async def _replica_up(self, server: Server) -> None:
        plan, process = self.plan, server.process
        engine = EngineChoice(
            scripted=ScriptedConfig(
                context_tokens=256,
                kv_tokens=plan.kv_tokens,
                max_sequences=plan.slots,
                itl_base_s=plan.itl_s,
            )
        )
        actor = Replica.__new__(Replica)
        await LLMReplica.__init__(actor, MODEL, engine, Path())
        server.actor = actor
        self.trace(process, "is up")
        self.network.replicas[process.name] = server
        self.tell_routers()

    def start_gateway(self) -> None:
        process = Process(f"gateway{len(self.gateways)}")
        self.known[process] = set()
        model = process.context.run(ModelClient, MODEL, process.name, lambda: None)
        if self.plan.hedging:
            for _ in range(50):
                model._hedging.observe(2 * self.plan.itl_s, 0)
            model._hedging.earn(100_000)
        self.gateways.append(Server(process, model))
        self.tell_routers()

    # --- routers -------------------------------------------------------------------------------------

    def has_left(self, caller: Process, replica_id: str) -> bool:
        return self.directories.of(caller).has_left(MODEL, replica_id)

    def knows(self, caller: Process, replica_id: str) -> bool:
        return replica_id in self.known[caller]

    def is_dead(self, caller: Process, replica_id: str) -> None:
        """A call showed it: the router drops the replica at once."""
        self._news(caller, frozenset(self.known[caller] - {replica_id}))()

    def tell_routers(self) -> None:
        """Every gateway hears of the replicas there are now, each in its own time, in order."""
        ids = frozenset(
            s.process.name
            for s in self.replicas
            if s.actor is not None and s.process.state is not State.DEAD and not s.draining
        )
        for gateway in self.gateways:
            news = self._news(gateway.process, ids)
            self.network.post((gateway.process, "router"), news, _ROUTER_NEWS_S)

    def _news(self, process: Process, ids: frozenset[str]) -> Callable[[], None]:
        def arrive() -> None:
            if process.state is not State.DEAD:
                self.trace(process, "router knows", *sorted(ids))
                self.known[process] = set(ids)
                process.context.run(self.directories.of(process).update, MODEL, ids)

        return arrive

    # --- callers -------------------------------------------------------------------------------------

    def arrive(self, ask: Ask) -> None:
        """A request comes to one of the gateways that live."""
        gateway = pick(self.alive(self.gateways), ask.gateway)
        caller = Caller(ask, self.loop.time)
        self.callers.append(caller)
        if gateway is None:
            caller.end("connection")
            return
        self.trace(gateway.process, "takes", ask.request_id)
        gateway.callers.append(caller)
        task = self.loop.create_task(caller.run(gateway.actor), context=gateway.process.context)
        if ask.leaves_after_s is not None:
            self.loop.call_later(ask.leaves_after_s, self._leave, gateway, task)

    def _leave(self, gateway: Server, task: asyncio.Task[None]) -> None:
        self.loop.call_soon(task.cancel, context=gateway.process.context)

    # --- the end of a process --------------------------------------------------------------------------

    def kill(self, server: Server) -> None:
        """kill -9."""
        process = server.process
        process.state = State.DEAD
        self.network.process_died(process)
        for caller in server.callers:
            caller.end("connection")
        if server in self.replicas:
            self.tell_routers()

    # --- what is true at every moment ----------------------------------------------------------------

    def _check_books(self, server: Server) -> None:
        sums = server.actor.conservation()
        accepted = sums.pop("accepted")
        if accepted != sum(sums.values()):
            self.wrongs.append(f"{server.process}: accepted {accepted} is not the sum of {sums}")
            server.process.after_step = None
        if server.watch is not None and not self.faults:
            server.watch.look()
            if server.watch.wrong is not None:
                self.wrongs.append(server.watch.wrong)
                server.watch = None

    def check_command(self, command: Any) -> None:
        """What a gateway tells a queue."""
        if isinstance(command, frames.Submit) and command.ticket.attempt > ATTEMPTS:
            self.wrongs.append(
                f"{command.ticket.request_id} is tried for the {command.ticket.attempt}th time"
            )

    def alive(self, servers: Iterable[Server]) -> list[Server]:
        """Those that are up and not dead."""
        return [s for s in servers if s.actor is not None and s.process.state is not State.DEAD]

    def deaths(self) -> int:
        """Faults that may have cost a request an attempt."""
        return sum(kind in COSTS_AN_ATTEMPT for kind in self.faults)


def pick(items: list[Any], share: float) -> Any:
    """The one that the seed means; None of none."""
    return items[int(share * len(items)) % len(items)] if items else None


def replica_context() -> Any:
    """In the place of `serve.get_replica_context`."""
    return SimpleNamespace(replica_id=SimpleNamespace(unique_id=current_process().name), app_name=MODEL)
