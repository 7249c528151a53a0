"""The msgpack frames between gateways, queues and replicas.

Owns the wire format of the control path and the bus: a frame is a list of small tagged arrays. Used by the
handles on the calling side and by `BatchingQueue` and `LLMReplica` on the other. Every frame holds whatever
became ready in one event-loop tick; there is no timer.
"""

from __future__ import annotations

from typing import Any

import msgspec

from actors.errors import InvalidRequest, PayloadTooLarge
from actors.policies.decisions import Outcome
from actors.types import GenerationRequest, Grant, ModelCard, Ticket, TokenDelta

# Serve's gRPC refuses messages above 4 MiB. A frame is cut at this, so one request may be as large.
MOST_FRAME_BYTES = 3 << 20


class Submit(msgspec.Struct, frozen=True, array_like=True, tag="submit"):
    """Gateway → queue: a request wants to run."""

    ticket: Ticket


class End(msgspec.Struct, frozen=True, array_like=True, tag="end"):
    """Gateway → queue: a ticket's life is over; its place or credit is free."""

    request_id: str
    outcome: Outcome
    output_tokens: int = 0  # of this attempt, as far as the gateway has seen them


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


class Preempted(msgspec.Struct, frozen=True, array_like=True, tag="preempted"):
    """Queue → gateway: a running request's slot is wanted; stop it and submit it again with what it has."""

    request_id: str


class Lost(msgspec.Struct, frozen=True, array_like=True, tag="lost"):
    """Queue → gateway: a replica has fallen silent; what runs there goes elsewhere."""

    replica_id: str


class Start(msgspec.Struct, frozen=True, array_like=True, tag="start"):
    """Gateway → replica: generate; `stream` names it on this gateway's bus."""

    stream: int
    request: msgspec.Raw  # `encode_request`: one that cannot be sent fails alone, not with its whole frame
    attempt: int = 1  # of this request: an earlier one may still be ending on the same replica


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
    produced_tokens: list[int]
    start_up_s: float


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    """Queue → gateway, first on every connection and whenever the card changes; None until a replica came."""

    card: ModelCard | None


QueueCommand = Submit | End | Gone
QueueEvent = Granted | Refused | Preempted | Lost | Hello
ReplicaCommand = Start | Abort

encode = msgspec.msgpack.Encoder().encode
decode_queue_commands = msgspec.msgpack.Decoder(list[QueueCommand]).decode
decode_queue_events = msgspec.msgpack.Decoder(list[QueueEvent]).decode
decode_replica_commands = msgspec.msgpack.Decoder(list[ReplicaCommand]).decode
decode_request = msgspec.msgpack.Decoder(GenerationRequest).decode
decode_stream_events = msgspec.msgpack.Decoder(list[StreamEvent]).decode
decode_report = msgspec.msgpack.Decoder(Report).decode


def encode_request(request: GenerationRequest) -> msgspec.Raw:
    """The request as `Start` carries it.

    Raises:
        InvalidRequest: it holds a value that msgpack has no form for.
        PayloadTooLarge: it does not fit a frame.
    """
    try:
        encoded = encode(request)
    except (OverflowError, UnicodeEncodeError, TypeError, RecursionError) as error:
        raise InvalidRequest(f"the request holds a value that cannot be passed to a model: {error}") from None
    if len(encoded) > MOST_FRAME_BYTES:
        raise PayloadTooLarge(
            f"the request has {len(encoded)} bytes; at most {MOST_FRAME_BYTES} can be passed to a model"
        )
    return msgspec.Raw(encoded)


def frames_of(commands: list[ReplicaCommand]) -> list[tuple[list[ReplicaCommand], bytes]]:
    """The commands in order, in as few frames as their size allows, each beside what it holds."""
    frames: list[tuple[list[ReplicaCommand], bytes]] = []
    part: list[ReplicaCommand] = []
    size = 0
    for command in commands:
        bytes_ = len(memoryview(command.request)) if isinstance(command, Start) else 0
        if part and size + bytes_ > MOST_FRAME_BYTES:
            frames.append((part, encode(part)))
            part, size = [], 0
        part.append(command)
        size += bytes_
    return [*frames, (part, encode(part))]
