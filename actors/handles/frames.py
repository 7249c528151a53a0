"""The msgpack frames between gateways, queues and replicas.

Owns the wire format of the control path and the bus: a frame is a list of small tagged arrays. Used by the
handles on the calling side and by `BatchingQueue` and `LLMReplica` on the other. Every frame holds whatever
became ready in one event-loop tick; there is no timer.
"""

from __future__ import annotations

from typing import Any

import msgspec

from actors.policies.dispatch import Outcome
from actors.types import GenerationRequest, Grant, ModelCard, Ticket, TokenDelta


class Submit(msgspec.Struct, frozen=True, array_like=True, tag="submit"):
    """Gateway → queue: a request wants to run."""

    ticket: Ticket


class End(msgspec.Struct, frozen=True, array_like=True, tag="end"):
    """Gateway → queue: a ticket's life is over; its place or credit is free."""

    request_id: str
    outcome: Outcome


class Gone(msgspec.Struct, frozen=True, array_like=True, tag="gone"):
    """Gateway → queue: a replica cannot be reached any more, or has left the router and finishes its work."""

    replica_id: str
    draining: bool = False


class Granted(msgspec.Struct, frozen=True, array_like=True, tag="granted"):
    """Queue → gateway: run it there."""

    grant: Grant


class Refused(msgspec.Struct, frozen=True, array_like=True, tag="refused"):
    """Queue → gateway: it will not run; `error` is `ShoalError.to_wire`."""

    request_id: str
    error: dict[str, Any]


class Start(msgspec.Struct, frozen=True, array_like=True, tag="start"):
    """Gateway → replica: generate; `stream` names it on this gateway's bus."""

    stream: int
    request: GenerationRequest


class Abort(msgspec.Struct, frozen=True, array_like=True, tag="abort"):
    """Gateway → replica: stop a stream."""

    stream: int


class StreamEvent(msgspec.Struct, frozen=True, array_like=True):
    """Replica → gateway, on the bus: what one engine step adds to one stream, or its failure."""

    stream: int
    delta: TokenDelta | None
    error: dict[str, Any] | None = None


class Report(msgspec.Struct, frozen=True, array_like=True):
    """Replica → queue, twice a second."""

    replica_id: str
    card: ModelCard
    max_sequences: int
    kv_tokens: int
    running: list[str]
    start_up_s: float


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    """Queue → gateway, first on every connection and whenever the card changes; None until a replica came."""

    card: ModelCard | None


QueueCommand = Submit | End | Gone
QueueEvent = Granted | Refused | Hello
ReplicaCommand = Start | Abort

encode = msgspec.msgpack.Encoder().encode
decode_queue_commands = msgspec.msgpack.Decoder(list[QueueCommand]).decode
decode_queue_events = msgspec.msgpack.Decoder(list[QueueEvent]).decode
decode_replica_commands = msgspec.msgpack.Decoder(list[ReplicaCommand]).decode
decode_stream_events = msgspec.msgpack.Decoder(list[StreamEvent]).decode
decode_report = msgspec.msgpack.Decoder(Report).decode
