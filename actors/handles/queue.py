"""A model's `BatchingQueue` as gateways and replicas see it.

`QueueClient` (one per gateway and model) submits tickets and receives grants: the commands of one tick leave as one
unary call, grants come back with its answer where slots are free, else on one open stream. When that stream ends the
queue has died or moved: waiting tickets are submitted again with the time they have waited. `QueueReporter` (one per
replica) carries the replica's report. What to do with a grant is the gateway's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from typing import Any, Protocol

from actors.errors import DeadlineExceeded, ShoalError, Unavailable, from_wire
from actors.handles import frames
from actors.handles.call import cancelled, deployment_handle, detached, ours, result
from actors.handles.outbox import Coalescer
from actors.policies.decisions import Outcome
from actors.telemetry import logger
from actors.types import Grant, ModelCard, Ticket

QUEUE_DEPLOYMENT = "BatchingQueue"
_SEND_TIMEOUT_S = 5.0
_HELLO_TIMEOUT_S = 10.0
_RECONNECT_S = (0.05, 1.0)  # first and longest pause between attempts to reach the queue
_log = logger("queue_client")


@dataclass(slots=True)
class _Pending:
    ticket: Ticket
    sent_at: float  # monotonic
    answer: asyncio.Future[Grant]
    submitted: bool = False

    def again(self, now: float) -> Ticket:
        """The ticket as it is to be submitted over a new connection."""
        passed_s = now - self.sent_at
        return replace(
            self.ticket,
            timeout_s=max(self.ticket.timeout_s - passed_s, 0.0),
            waited_s=self.ticket.waited_s + passed_s,
            returning=self.ticket.returning or self.submitted,
        )


class QueueListener(Protocol):
    """Who hears what a queue says of its own accord."""

    def queue_lost(self) -> None:
        """It cannot be reached: its model may have been removed."""

    def preempted(self, request_id: str) -> None:
        """A running request is to give its slot up."""

    def replica_silent(self, replica_id: str) -> None:
        """A replica does not report any more."""


class QueueClient:
    """One model's queue, from one gateway.

    Args:
        app_name: the model's Serve application.
        gateway_id: this gateway replica.
        listener: hears what is no answer to a ticket.
    """

    def __init__(self, app_name: str, gateway_id: str, listener: QueueListener) -> None:
        self._app_name = app_name
        self._gateway_id = gateway_id
        self._listener = listener
        self._connections = itertools.count()
        self._connection: str | None = None  # id of the live connection
        self._pending: dict[str, _Pending] = {}
        self._unsaid: dict[str, frames.Gone] = {}  # by replica id: a queue may outlive the connection to it
        self._commands: Coalescer[frames.QueueCommand] = Coalescer(self._send)
        self._runner: asyncio.Task[None] | None = None
        self._grants_handle: Any = None
        self._send_handle: Any = None
        self._card_known = asyncio.Event()
        self._closed = False
        self.card: ModelCard | None = None

    async def acquire(self, ticket: Ticket) -> Grant:
        """Wait in line for a slot. Cancelling gives the place up.

        Raises:
            Unavailable: the model was removed.
            Overloaded: refused at once, with a computed Retry-After.
            DeadlineExceeded: the deadline passed while waiting.
        """
        if self._closed:
            raise _removed()
        self._ensure_connected()
        answer: asyncio.Future[Grant] = asyncio.get_running_loop().create_future()
        pending = self._pending[ticket.request_id] = _Pending(ticket, time.monotonic(), answer)
        if self._connection is not None:
            self._submit(pending, ticket)
        outcome: Outcome | None = "cancelled"
        try:
            async with asyncio.timeout(ticket.timeout_s):
                grant = await answer
            outcome = None
            return grant
        except TimeoutError:
            outcome = "expired"
            raise DeadlineExceeded(f"no free slot within {ticket.timeout_s:.1f} s") from None
        except ShoalError:
            outcome = None  # refused: the queue has forgotten it already
            raise
        finally:
            del self._pending[ticket.request_id]
            if outcome is not None:  # also gives back a grant that came in the tick of the cancellation
                self.end(ticket.request_id, outcome)

    def end(self, request_id: str, outcome: Outcome, output_tokens: int = 0) -> None:
        """A ticket's life, or one attempt of it, is over: its credit or place is free.

        Args:
            request_id: of the ticket.
            outcome: how it ended.
            output_tokens: what the attempt produced.
        """
        if self._connection is not None:
            self._commands.put(frames.End(request_id, outcome, output_tokens))

    def gone(self, replica_id: str, *, draining: bool = False) -> None:
        """Tell the queue that a replica cannot be reached, or that it has left the router and drains."""
        self._tell_gone(frames.Gone(replica_id, draining))

    def _tell_gone(self, gone: frames.Gone) -> None:
        if self._connection is not None:
            self._commands.put(gone)
        else:
            self._unsaid[gone.replica_id] = gone

    async def wait_for_card(self, timeout_s: float) -> ModelCard | None:
        """The model's card once any replica has registered; None if that takes longer."""
        if not self._closed:
            self._ensure_connected()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._card_known.wait()
        return self.card

    async def close(self) -> None:
        """End the connection: the queue forgets this gateway's tickets, and those who wait are told."""
        self._closed = True
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.gather(self._runner, return_exceptions=True)
            self._runner = None
        for pending in self._pending.values():
            if not pending.answer.done():
                pending.answer.set_exception(_removed())

    def _ensure_connected(self) -> None:
        if self._runner is None or self._runner.done():
            self._runner = detached(self._run())

    async def _run(self) -> None:
        """Keep one connection open; every new one submits the waiting tickets again."""
        pause_s = _RECONNECT_S[0]
        while True:
            connection = f"{self._gateway_id}/{next(self._connections)}"
            try:
                async with contextlib.aclosing(self._events(connection)) as frames_:
                    async for events in frames_:
                        if self._connection is None:
                            self._connected(connection)
                            pause_s = _RECONNECT_S[0]
                        for event in events:
                            self._apply(event)
                reason = "it closed the connection"
            except asyncio.CancelledError:
                if cancelled():
                    raise
                reason = "it cancelled the connection"
            except Exception as error:  # whatever ended it, the answer is to connect again
                reason = ours(error, "queue").message
            finally:
                if self._connection == connection:
                    self._connection = None
            _log.info("queue_lost", app=self._app_name, reason=reason)
            self._listener.queue_lost()
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, _RECONNECT_S[1])

    async def _events(self, connection: str) -> AsyncGenerator[list[frames.QueueEvent], None]:
        if self._grants_handle is None:
            handle = deployment_handle(QUEUE_DEPLOYMENT, self._app_name)
            self._grants_handle = handle.options(stream=True, method_name="grants", _by_reference=False)
            self._send_handle = handle.options(method_name="send", _by_reference=False)
        stream = self._grants_handle.remote(connection)
        try:
            async with asyncio.timeout(_HELLO_TIMEOUT_S) as until_hello:
                async for frame in stream:
                    until_hello.reschedule(None)
                    yield frames.decode_queue_events(frame)
        finally:
            stream.cancel()

    def _connected(self, connection: str) -> None:
        self._connection = connection
        unsaid, self._unsaid = self._unsaid, {}
        for gone in unsaid.values():
            self._commands.put(gone)
        now = time.monotonic()
        for pending in self._pending.values():
            if pending.answer.done():
                continue  # its caller wakes in this tick
            self._submit(pending, pending.again(now))

    def _submit(self, pending: _Pending, ticket: Ticket) -> None:
        self._commands.put(frames.Submit(ticket))
        pending.submitted = True

    def _apply(self, event: frames.QueueEvent) -> None:
        if isinstance(event, frames.Hello):
            if event.card is not None:
                self.card = event.card
                self._card_known.set()
        elif isinstance(event, frames.Granted):
            pending = self._pending.get(event.grant.request_id)
            if pending is None or pending.answer.done():
                self.end(event.grant.request_id, "cancelled")
            else:
                pending.answer.set_result(event.grant)
        elif isinstance(event, frames.Refused):
            pending = self._pending.get(event.request_id)
            if pending is not None and not pending.answer.done():
                pending.answer.set_exception(from_wire(event.error))
        elif isinstance(event, frames.Preempted):
            # Behind the grant of the same frame: who waits for that takes it in its own turn.
            asyncio.get_running_loop().call_soon(self._listener.preempted, event.request_id)
        else:
            self._listener.replica_silent(event.replica_id)

    async def _send(self, commands: list[frames.QueueCommand]) -> None:
        connection = self._connection
        if connection is None:
            self._keep(commands)
            return
        try:
            call = self._send_handle.remote(connection, frames.encode(commands))
            answer = await result(call, timeout_s=_SEND_TIMEOUT_S, what="queue")
            for event in frames.decode_queue_events(answer):
                self._apply(event)
        except Exception as error:  # whatever it was, commands were lost
            _log.warning("queue_send_failed", app=self._app_name, reason=ours(error, "queue").message)
            self._reconnect(connection)
            self._keep(commands)

    def _keep(self, commands: list[frames.QueueCommand]) -> None:
        """Tickets are submitted again by the next connection; what is said of replicas is said again, too."""
        for command in commands:
            if isinstance(command, frames.Gone):
                self._tell_gone(command)

    def _reconnect(self, connection: str) -> None:
        """Commands were lost: only a new connection brings both sides to the same state."""
        if self._connection == connection and self._runner is not None:
            self._runner.cancel()
            self._connection = None
            self._runner = detached(self._run())


def _removed() -> Unavailable:
    return Unavailable("the model was removed", retry_after_s=1.0)


class QueueReporter:
    """A replica's line to its own application's queue."""

    def __init__(self, app_name: str) -> None:
        self._app_name = app_name
        self._handle: Any = None

    async def report(self, report: frames.Report) -> None:
        """Send one report.

        Raises:
            Unavailable: the queue is not there at the moment; the next report finds it.
        """
        if self._handle is None:
            handle = deployment_handle(QUEUE_DEPLOYMENT, self._app_name)
            self._handle = handle.options(method_name="report", _by_reference=False)
        try:
            await result(self._handle.remote(frames.encode(report)), timeout_s=_SEND_TIMEOUT_S, what="queue")
        except Exception as error:
            raise Unavailable(f"the queue cannot be reached: {ours(error, 'queue').message}") from error
