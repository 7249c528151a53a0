"""Serve between simulated processes: handles whose calls take time, keep their order, and break with a process.

Stands for Ray Serve behind `deployment_handle`: calls to the queue wait while there is none, calls to a replica go
to the one that is named or fail once it has left, as `GrantRouter` does it. Each direction between two processes
is a line in which nothing overtakes; how long a message takes is the seed's choice.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from actors.errors import ReplicaGone
from tests.simulation.calls import QUEUE, Call, Server, Stream, Unary
from tests.simulation.loop import NOBODY, Process, State, VirtualLoop

UNKNOWN_REPLICA_WAIT_S = 8.0


class Router(Protocol):
    """Where a call goes."""

    def has_left(self, caller: Process, replica_id: str) -> bool: ...

    def knows(self, caller: Process, replica_id: str) -> bool: ...

    def is_dead(self, caller: Process, replica_id: str) -> None: ...


class Network:
    """All messages.

    Args:
        loop: the time.
        rng: delays.
        latency_s: the mean of a message.
        trace: told about every message in words.
    """

    def __init__(
        self, loop: VirtualLoop, rng: random.Random, latency_s: float, trace: Callable[..., None]
    ) -> None:
        self.loop, self.rng, self.latency_s, self.trace = loop, rng, latency_s, trace
        self.queue: Server | None = None
        self.replicas: dict[str, Server] = {}
        self.router: Router | None = None
        self.on_command: Callable[[Any], None] = lambda _: None  # of a gateway to a queue
        self.open: dict[Call, None] = {}  # in order
        self.overtaking = False  # calls of one process to another may overtake each other
        self.closed = False  # the run is over: nothing arrives any more
        self._waiting_for_queue: deque[Call] = deque()
        self._lines: dict[tuple[Any, Any], float] = {}

    def handle(self, deployment: str, app_name: str) -> Handle:
        """In the place of `actors.handles.call.deployment_handle`."""
        return Handle(self, deployment, app_name, {})

    def delay_s(self, mean_s: float | None = None) -> float:
        """Mostly short, sometimes long."""
        return self.rng.expovariate(1.0 / (self.latency_s if mean_s is None else mean_s))

    def post(self, line: tuple[Any, Any], action: Callable[[], None], mean_s: float | None = None) -> None:
        """Run `action` when the message arrives, behind everything on the same line."""
        at = max(self.loop.time() + self.delay_s(mean_s), self._lines.get(line, 0.0) + 1e-6)
        self._lines[line] = at
        self.loop.call_at(at, action, context=NOBODY)  # it is under way, whatever becomes of who sent it

    def queue_is_up(self, server: Server) -> None:
        """Who waited for it is let through, in order."""
        self.queue = server
        waiting, self._waiting_for_queue = self._waiting_for_queue, deque()
        for call in waiting:
            call.go_to(server)

    def process_died(self, process: Process) -> None:
        """Its calls vanish, calls to it break."""
        if self.queue is not None and self.queue.process is process:
            self.queue = None
        for call in list(self.open):
            if call.caller is process:
                call.caller_died()
            elif call.server is not None and call.server.process is process:
                call.server_died()

    def streams(self, method: str) -> list[Call]:
        """Open streams of a method."""
        return [call for call in self.open if call.method == method and call.server is not None]

    def route(self, call: Call) -> None:
        """Find the server of a call that was just made."""
        if call.deployment == QUEUE:
            if self.queue is not None:
                call.go_to(self.queue)
            else:
                self._waiting_for_queue.append(call)
            return
        self._route_to_replica(call, self.loop.time() + UNKNOWN_REPLICA_WAIT_S)

    def _route_to_replica(self, call: Call, until: float) -> None:
        wanted = call.kwargs["replica"]
        assert self.router is not None
        if call.caller.state is State.DEAD or call not in self.open:
            return
        if self.router.knows(call.caller, wanted):
            server = self.replicas[wanted]
            if server.process.state is State.DEAD:
                call.server_died()
            else:
                call.go_to(server)
        elif self.router.has_left(call.caller, wanted) or self.loop.time() >= until:
            self.post((call, "answer"), lambda: call.fail(ReplicaGone("the granted replica has left")))
        else:
            self.loop.call_later(0.1, self._route_to_replica, call, until)


class Handle:
    """`DeploymentHandle`."""

    def __init__(self, network: Network, deployment: str, app_name: str, options: dict[str, Any]) -> None:
        self.app_name = app_name
        self._network, self._deployment, self._options = network, deployment, options

    def options(self, **options: Any) -> Handle:
        return Handle(self._network, self._deployment, self.app_name, options)

    def remote(self, *args: Any, **kwargs: Any) -> Call:
        assert self._options["_by_reference"] is False
        kind = Stream if self._options.get("stream") else Unary
        call = kind(self._network, self._deployment, self._options["method_name"], args, kwargs)
        if not self._network.closed:
            self._network.open[call] = None
            self._network.route(call)
        return call
