"""A model's `LLMReplica` pool as a gateway sees it: the bus.

Owns one `Bus` per replica: one open Serve stream that carries a frame per engine step with all streams' new
tokens, and one coalesced call per tick for new requests and cancellations. A bus that breaks is the death of
its replica; an idle bus whose replica has left the router is closed, so that the replica's drain ends. Which
replica a request goes to was decided by the queue.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any, Protocol

from actors.errors import ReplicaGone, ShoalError, from_wire
from actors.handles import frames
from actors.handles.call import deployment_handle, detached, ours, result
from actors.handles.outbox import Coalescer
from actors.handles.replica_directory import DIRECTORY
from actors.telemetry import logger
from actors.types import GenerationRequest, TokenDelta

LLM_DEPLOYMENT = "LLMReplica"
_OPEN_TIMEOUT_S = 10.0
_SEND_TIMEOUT_S = 10.0
_log = logger("bus")


class BusOwner(Protocol):
    """Who is told about the life of buses."""

    def replica_lost(self, replica_id: str) -> None:
        """The bus broke: the replica is dead or unreachable."""

    def replica_draining(self, replica_id: str) -> None:
        """The replica has left the router and finishes its work."""


class Sink(Protocol):
    """Where the tokens of one stream go."""

    @property
    def ended(self) -> bool:
        """Nothing more is wanted: the last delta came, or it failed, or it was left."""

    def push(self, delta: TokenDelta) -> None:
        """A delta from the engine, in order."""

    def end(self, error: ShoalError) -> None:
        """It failed; nothing more comes."""


class Bus:
    """One connection to one replica; made by `ReplicaPool`."""

    def __init__(
        self, handle: Any, connection: str, replica_id: str, on_close: Callable[[Bus], None]
    ) -> None:
        self._app_name: str = handle.app_name
        self._send_handle = handle.options(method_name="send", _by_reference=False)
        self._bus_handle = handle.options(method_name="bus", stream=True, _by_reference=False)
        self._connection = connection
        self.replica_id = replica_id
        self._on_close = on_close
        self._streams: dict[int, Sink] = {}
        self._numbers = itertools.count(1)
        self._commands: Coalescer[frames.ReplicaCommand] = Coalescer(self._send)
        self._opened = asyncio.Event()
        self.broken: ShoalError | None = None
        self.closed_idle = False  # by us; says nothing of the replica
        self._reader = detached(self._read())

    async def start(self, request: GenerationRequest, attempt: int, sink: Sink) -> RunningStream:
        """Start a request on the replica.

        Raises:
            ReplicaGone: the bus cannot be opened, or its replica takes nothing new.
            InvalidRequest, PayloadTooLarge: the request cannot be sent.
        """
        encoded = frames.encode_request(request)
        if not self._opened.is_set():
            try:
                async with asyncio.timeout(_OPEN_TIMEOUT_S):
                    await self._opened.wait()
            except TimeoutError:
                self._reader.cancel()  # the next one tries a new bus
                raise ReplicaGone("the replica's bus did not open in time") from None
        if self.broken is not None:
            raise self.broken
        if self._draining():
            raise ReplicaGone("the replica has left and finishes what it runs")
        number = next(self._numbers)
        self._streams[number] = sink
        self._commands.put(frames.Start(number, encoded, attempt))
        return RunningStream(self, number)

    def drop(self, number: int) -> None:
        """Cancel a stream that has not ended, down to the engine."""
        if self._forget(number) is not None:
            self._commands.put(frames.Abort(number))

    def give_up(self) -> None:
        """Close it and take what runs on it for lost: the replica has fallen silent."""
        self._reader.cancel()

    def close_if_idle(self) -> None:
        """Close once nothing runs on it."""
        if not self._streams:
            self.closed_idle = True
            self._reader.cancel()

    async def _read(self) -> None:
        response: Any = None
        error: ShoalError = ReplicaGone("the replica closed its bus")
        try:
            response = self._bus_handle.remote(self._connection, replica=self.replica_id)
            async for frame in response:
                self._opened.set()
                for event in frames.decode_stream_events(frame):
                    self._deliver(event)
        except Exception as caught:  # whatever broke it, the replica cannot be used over this bus
            error = ReplicaGone(ours(caught, "replica").message)
        finally:
            if response is not None:
                response.cancel()
            self._close(error)

    def _deliver(self, event: frames.StreamEvent) -> None:
        stream = self._streams.get(event.stream)
        if stream is None:
            return  # cancelled here, its last tokens were under way
        if event.delta is not None:
            stream.push(event.delta)
        if event.error is not None:
            stream.end(from_wire(event.error))
        if stream.ended:
            self._forget(event.stream)

    def _forget(self, number: int) -> Sink | None:
        """Take a stream off the bus. A replica that has left the router waits for its last bus to close."""
        stream = self._streams.pop(number, None)
        if not self._streams and self._draining():
            self.close_if_idle()
        return stream

    def _draining(self) -> bool:
        return DIRECTORY.has_left(self._app_name, self.replica_id)

    def _close(self, error: ShoalError) -> None:
        self.broken = error
        self._opened.set()  # who waits for it sees `broken`
        self._on_close(self)
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.end(error)

    async def _send(self, commands: list[frames.ReplicaCommand]) -> None:
        await asyncio.gather(*(self._send_frame(part, frame) for part, frame in frames.frames_of(commands)))

    async def _send_frame(self, commands: list[frames.ReplicaCommand], frame: bytes) -> None:
        try:
            call = self._send_handle.remote(self._connection, frame, replica=self.replica_id)
            await result(call, timeout_s=_SEND_TIMEOUT_S, what="replica")
        except Exception as caught:  # whatever it was, those who wait must hear of it
            error = ours(caught, "replica")
            _log.warning("bus_send_failed", replica=self.replica_id, reason=error.message)
            if isinstance(error, ReplicaGone) and not self._draining():
                self._reader.cancel()  # the bus is dead and will hear it later: nothing more may be granted there
                return
            gone = ReplicaGone("the replica could not be reached")
            for command in commands:  # only these are lost; others run on, over the open bus
                stream = self._forget(command.stream)
                if stream is not None:
                    stream.end(gone)
                    self._commands.put(frames.Abort(command.stream))  # it may have arrived all the same


class RunningStream:
    """A request that runs on a replica: the way to stop it."""

    def __init__(self, bus: Bus, number: int) -> None:
        self._bus = bus
        self._number = number

    def cancel(self) -> None:
        """Stop it in the engine; nothing happens when it has ended."""
        self._bus.drop(self._number)


class ReplicaPool:
    """All buses of one gateway to one model's replicas.

    Args:
        app_name: the model's Serve application.
        gateway_id: this gateway replica.
        owner: told when a replica is lost or drains.
    """

    def __init__(self, app_name: str, gateway_id: str, owner: BusOwner) -> None:
        self._app_name = app_name
        self._gateway_id = gateway_id
        self._owner = owner
        self._buses: dict[str, Bus] = {}
        self._numbers = itertools.count()
        self._handle: Any = None
        self._closing = False

    async def start(
        self, replica_id: str, request: GenerationRequest, attempt: int, sink: Sink
    ) -> RunningStream:
        """Run a request on the granted replica.

        Args:
            replica_id: from the grant.
            request: what to generate.
            attempt: which start of this request it is; an earlier one may still be ending there.
            sink: where the tokens go.

        Raises:
            ReplicaGone: it has left or died; take a new grant.
        """
        bus = self._buses.get(replica_id)
        if bus is None:
            bus = self._open(replica_id)
        try:
            return await bus.start(request, attempt, sink)
        except ReplicaGone:
            if DIRECTORY.has_left(self._app_name, replica_id):
                self._owner.replica_draining(replica_id)  # its queue, new perhaps, has not heard of it
            raise

    def give_up(self, replica_id: str) -> None:
        """A replica has fallen silent: its streams end with `ReplicaGone`."""
        bus = self._buses.get(replica_id)
        if bus is not None:
            bus.give_up()

    def close(self) -> None:
        """Close every idle bus, saying nothing of their replicas: this gateway leaves, not they."""
        self._closing = True
        for bus in list(self._buses.values()):
            bus.close_if_idle()

    def _open(self, replica_id: str) -> Bus:
        if self._handle is None:
            self._handle = deployment_handle(LLM_DEPLOYMENT, self._app_name)
            DIRECTORY.subscribe(self._app_name, self._replicas_changed)
        connection = f"{self._gateway_id}/{next(self._numbers)}"
        bus = self._buses[replica_id] = Bus(self._handle, connection, replica_id, self._closed)
        return bus

    def _replicas_changed(self, _replica_ids: frozenset[str]) -> None:
        for replica_id, bus in list(self._buses.items()):
            # One that is new may have been granted before its router has heard of it.
            if DIRECTORY.has_left(self._app_name, replica_id):
                self._owner.replica_draining(replica_id)
                bus.close_if_idle()

    def _closed(self, bus: Bus) -> None:
        if self._buses.get(bus.replica_id) is bus:
            del self._buses[bus.replica_id]
        if not self._closing and not bus.closed_idle:
            self._owner.replica_lost(bus.replica_id)
