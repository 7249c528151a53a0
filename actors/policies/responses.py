"""What a durable answer consists of: the task, the facts of its log, and what a new owner goes on from.

Pure. A response is told by facts: they are appended to its log as they come, and everything else (its status, its
text, the events of its stream and their numbers) follows from reading them in order. So whoever reads the log at
any time, in any process, sees the same answer. `actors.responder` writes facts, `actors.stores.responses` keeps
them, `app.schemas` turns them into OpenAI's objects and events.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from actors.errors import InvalidRequest, RateLimited, ShoalError
from actors.policies.limits import UNLIMITED, Limits
from actors.types import GenerationCall, Passage, Principal, TokenDelta

KIND = "response"  # the job log's name for these jobs

Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
ENDED: frozenset[Status] = frozenset({"completed", "incomplete", "failed", "cancelled"})


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseTask:
    """A background response as a runner gets it: nothing of it has to be looked up again."""

    response_id: str
    principal: Principal  # with the class that it runs in
    call: GenerationCall  # its model is a deployed one's name, its request carries the tenant's salt
    limits: Limits = UNLIMITED  # of the key, as they were when it was accepted
    tenant_limits: Limits = UNLIMITED


# --- facts, in the order in which they can come ------------------------------------------------------


class Began(msgspec.Struct, frozen=True, array_like=True, tag="b"):
    """A runner has taken it."""


class Searched(msgspec.Struct, frozen=True, array_like=True, tag="s"):
    """What the model was given as context."""

    query: str
    passages: tuple[Passage, ...] = ()
    degraded: str = ""  # what the search had to leave out


class Said(msgspec.Struct, frozen=True, array_like=True, tag="t"):
    """More of the answer."""

    delta: TokenDelta


class Ended(msgspec.Struct, frozen=True, array_like=True, tag="e"):
    """It is over; nothing comes behind it."""

    status: Status
    code: str = ""  # of the error, in OpenAI's terms
    message: str = ""
    at: int = 0  # unix seconds
    stored: bool = True  # it can be retrieved later


Fact = Began | Searched | Said | Ended

encode_fact = msgspec.msgpack.Encoder().encode
decode_fact = msgspec.msgpack.Decoder(Fact).decode


def failed(error: ShoalError, at: int) -> Ended:
    """How an answer ends that `error` has ended."""
    return Ended(status="failed", code=_code(error), message=error.message, at=at)


def finished(deltas: Iterable[TokenDelta], at: int) -> Ended | None:
    """The end that these deltas bring; None when they bring none."""
    finish, complete = None, False
    for delta in deltas:
        finish = delta.finish_reason or finish
        complete = complete or delta.usage is not None
    if not complete:
        return None
    return Ended(status="incomplete" if finish == "length" else "completed", at=at)


def merged(deltas: Sequence[TokenDelta]) -> TokenDelta:
    """Several deltas of one choice as one: a log entry holds what has come since the last one."""
    if len(deltas) == 1:
        return deltas[0]
    return TokenDelta(
        deltas[0].choice,
        "".join(delta.text for delta in deltas),
        tuple(token_id for delta in deltas for token_id in delta.token_ids),
        finish_reason=next((d.finish_reason for d in reversed(deltas) if d.finish_reason), None),
        usage=next((d.usage for d in reversed(deltas) if d.usage), None),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Told:
    """What a log holds when somebody goes on with it."""

    entries: int
    began: bool
    searched: Searched | None
    deltas: tuple[TokenDelta, ...]
    ended: Ended | None


def told(facts: Sequence[Fact]) -> Told:
    """Read a whole log."""
    return Told(
        entries=len(facts),
        began=any(isinstance(fact, Began) for fact in facts),
        searched=next((fact for fact in facts if isinstance(fact, Searched)), None),
        deltas=tuple(fact.delta for fact in facts if isinstance(fact, Said)),
        ended=next((fact for fact in facts if isinstance(fact, Ended)), None),
    )


def task_payload(task: ResponseTask) -> Mapping[str, Any]:
    """What the job log holds of a task."""
    payload: Mapping[str, Any] = msgspec.to_builtins(task)
    return payload


def _code(error: ShoalError) -> str:
    """One of the codes that OpenAI's response object allows."""
    if isinstance(error, RateLimited):
        return "rate_limit_exceeded"
    return "invalid_prompt" if isinstance(error, InvalidRequest) else "server_error"
