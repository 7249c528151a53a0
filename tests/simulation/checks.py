"""What must be gone once everybody has an answer."""

from __future__ import annotations

from tests.simulation.loop import State
from tests.simulation.world import Server, World


def left_behind(world: World) -> list[str]:
    """What still runs, waits or is held in those that live; nothing, once a run has settled."""
    found: list[str] = []
    for server in world.alive(world.queues):
        found += _of_queue(server)
    for server in world.alive(world.replicas):
        if server.process.state is State.RUNNING:
            found += _of_replica(server)
    for server in world.alive(world.gateways):
        found += _of_gateway(world, server)
    found += [
        f"{server.process} was to drain and has not ended"
        for server in world.alive(world.replicas)
        if server.draining
    ]
    return found


def _of_queue(server: Server) -> list[str]:
    dispatcher = server.actor._dispatcher
    found = [
        f"{server.process} holds credit of {replica.replica_id}: {replica.sequences} sequences, "
        f"{replica.tokens} tokens, {list(replica.held)}"
        for replica in dispatcher.pool.replicas.values()
        if replica.held or replica.sequences or replica.tokens
    ]
    if dispatcher.in_flight():
        found.append(
            f"{server.process} has {dispatcher.in_flight()} in flight: {server.actor.conservation()}"
        )
    return found


def _of_replica(server: Server) -> list[str]:
    found = []
    actor = server.actor
    if actor._running:
        found.append(f"{server.process} still lists {list(actor._running.values())}")
    stats = actor._engine.stats()
    if stats.running or stats.waiting:
        found.append(f"{server.process}'s engine runs {stats.running} and has {stats.waiting} waiting")
    if any(connection.tasks for connection in actor._connections.values()):
        found.append(f"{server.process} has streams on a bus")
    return found


def _of_gateway(world: World, server: Server) -> list[str]:
    found = []
    model = server.actor
    if model._under_way:
        found.append(f"{server.process} has requests under way: {list(model._under_way)}")
    if model._queue._pending:
        found.append(f"{server.process} waits for grants: {list(model._queue._pending)}")
    found += [
        f"{server.process} has streams on the bus to {bus.replica_id}: {list(bus._streams)}"
        for bus in model._pool._buses.values()
        if bus._streams
    ]
    timers = world.loop.timers_of(server.process)
    if timers:
        found.append(f"{server.process} has timers: {timers}")
    allowed = len(model._pool._buses) + (model._queue._runner is not None)
    tasks = world.loop.tasks_of(server.process)
    if len(tasks) > allowed:
        found.append(f"{server.process} has {len(tasks)} tasks and not {allowed}: {tasks}")
    return found
