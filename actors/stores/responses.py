"""Responses as their tenants see them: accepted, stored, looked up, followed, cancelled, deleted.

The gateway calls it. A background response is a job with a record beside it, both written in one step before the
caller is answered; what became of it stands in its log (`actors.stores.response_log`). A response made while its
caller waited is stored when it is complete, in the same shape. The tenant is part of every key.

    shoal:{jobs:response}:record:<tenant>:<id>   hash: head (JSON, opaque here), items (JSON, opaque here),
                                                 history (msgpack of messages), background (0 or 1), mark,
                                                 keep_s (how long it is kept behind its end)
    shoal:{jobs:response}:log:<tenant>:<id>      list of facts
    shoal:{jobs:response}:claim:<tenant>:<key>   string: id and mark of the response that has an idempotency key,
                                                 for those made while their caller waits
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from pydantic import BaseModel, ConfigDict, Field
from redis.asyncio import Redis

from actors.errors import Conflict, InvalidRequest, NotFound
from actors.policies.responses import KIND, Ended, Fact, ResponseTask, encode_fact, task_payload
from actors.stores.jobs import GROUP, JobLog, JobRecord, key_of, record_of_job
from actors.stores.notices import Notices
from actors.stores.redis import script, translated
from actors.stores.response_log import CANCELLED, ResponseLog, log_key
from actors.types import Message

_PREFIX = "resp_"
_CLAIMED_S = 86_400  # as long as the job log remembers its keys
_HEX = frozenset("0123456789abcdef")


class ResponsesConfig(BaseModel):
    """How long responses last."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keep_s: int = Field(
        default=7 * 86_400, ge=60, description="How long a response can be retrieved after its end."
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredResponse:
    """What is kept of a response beside its log."""

    head: bytes  # JSON: the response object without what its log says
    items: bytes  # JSON: its input items
    history: tuple[Message, ...] = ()  # the conversation up to the answer, without instructions
    background: bool = False
    mark: str = ""  # of the request's body: an idempotency key stands for one body only


class Responses:
    """All responses.

    Args:
        redis: of `actors.stores.redis.connect`; stays its owner's to close.
        jobs: where background work is enqueued.
        config: see `ResponsesConfig`.
    """

    def __init__(self, redis: Redis, jobs: JobLog, config: ResponsesConfig | None = None) -> None:
        self._redis: Any = redis
        self._jobs = jobs
        self._keep_s = (config or ResponsesConfig()).keep_s
        self._notices = Notices(redis)
        self._log = ResponseLog(redis, self._notices)
        self._cancel = script(redis, "responses_cancel")

    @staticmethod
    def new_id() -> str:
        """A fresh id."""
        return f"{_PREFIX}{uuid.uuid4().hex}"

    async def accept(
        self, task: ResponseTask, stored: StoredResponse, idempotency_key: str | None = None
    ) -> tuple[str, StoredResponse]:
        """Take a background response; it is in the job log when this returns.

        Returns:
            Its id and what is stored of it: of an earlier one, if the key was used before.

        Raises:
            Conflict: the key was used with another body.
            Unavailable, StorageFull: it may or may not have been accepted.
        """
        job_id, tenant = _job_id(task.response_id), task.principal.tenant
        record = JobRecord(job_id=job_id, fields=_fields(stored, self._keep_s))
        payload = task_payload(task)
        known = await self._jobs.enqueue(
            KIND, tenant, payload, idempotency_key=idempotency_key, record=record
        )
        if known == job_id:
            return task.response_id, stored
        first_id = f"{_PREFIX}{known}"
        first = await self.get(tenant, first_id)
        if first.mark != stored.mark:
            raise _other_body()
        return first_id, first

    @translated("responses")
    async def claim(self, tenant: str, key: str, response_id: str, mark: str, for_s: float) -> str:
        """Take an idempotency key for a response whose caller waits; returns the id that has it.

        Args:
            tenant: whose key it is.
            key: the key.
            response_id: the response that would be made.
            mark: of the request's body.
            for_s: how long the key is held before the response is stored.

        Raises:
            Conflict: the key was used with another body.
        """
        name, wanted = key_of(KIND, "claim", tenant, key), f"{response_id} {mark}"
        if await self._redis.set(name, wanted, nx=True, px=max(1, round(for_s * 1e3))):
            return response_id
        known = (await self._redis.get(name) or wanted.encode()).decode()
        first_id, _, first_mark = known.partition(" ")
        if first_mark != mark:
            raise _other_body()
        return first_id

    @translated("responses")
    async def unclaim(self, tenant: str, key: str) -> None:
        """Give a key back: nothing was made under it."""
        await self._redis.delete(key_of(KIND, "claim", tenant, key))

    @translated("responses")
    async def store(
        self,
        tenant: str,
        response_id: str,
        stored: StoredResponse,
        facts: Sequence[Fact],
        idempotency_key: str | None = None,
    ) -> None:
        """Keep a response that is complete, and the key that it was made under."""
        job_id = _job_id(response_id)
        record, log = record_of_job(KIND, tenant, job_id), log_key(tenant, job_id)
        async with self._redis.pipeline(transaction=True) as pipe:
            if idempotency_key:
                pipe.expire(key_of(KIND, "claim", tenant, idempotency_key), _CLAIMED_S)
            pipe.hset(record, mapping=_fields(stored, self._keep_s))
            pipe.rpush(log, *map(encode_fact, facts))
            pipe.expire(record, self._keep_s)
            pipe.expire(log, self._keep_s)
            await pipe.execute()

    @translated("responses")
    async def get(self, tenant: str, response_id: str) -> StoredResponse:
        """What is stored beside the log.

        Raises:
            NotFound: there is none of that id, or it is another tenant's.
        """
        found = await self.find(tenant, response_id)
        if found is None:
            raise _not_found(response_id)
        return found

    @translated("responses")
    async def find(self, tenant: str, response_id: str) -> StoredResponse | None:
        """The same; None when there is none."""
        fields = await self._redis.hgetall(record_of_job(KIND, tenant, _job_id(response_id)))
        if not fields:
            return None
        return StoredResponse(
            head=fields[b"head"],
            items=fields[b"items"],
            history=msgspec.msgpack.decode(fields[b"history"], type=tuple[Message, ...]),
            background=fields[b"background"] == b"1",
            mark=fields[b"mark"].decode(),
        )

    async def facts(self, tenant: str, response_id: str) -> list[Fact]:
        """Everything that its log says now."""
        return await self._log.read(tenant, _job_id(response_id))

    def follow(self, tenant: str, response_id: str) -> AsyncIterator[list[Fact]]:
        """Its log from the beginning, and on as it grows; see `ResponseLog.follow`."""
        return self._log.follow(tenant, _job_id(response_id))

    async def cancel(self, tenant: str, response_id: str, at: int) -> None:
        """End a background response, waiting or running; one that has ended stays as it is.

        Raises:
            NotFound: there is none of that id.
            InvalidRequest: it does not run in the background.
        """
        if not (await self.get(tenant, response_id)).background:
            raise InvalidRequest(
                "only responses that were created with 'background': true can be cancelled", "response_id"
            )
        await self._end(tenant, _job_id(response_id), at)

    async def delete(self, tenant: str, response_id: str, at: int) -> None:
        """Remove a response; one that still runs is cancelled.

        Raises:
            NotFound: there is none of that id.
        """
        job_id = _job_id(response_id)
        await self._end(tenant, job_id, at)
        async with translated("responses"):
            removed = await self._redis.delete(record_of_job(KIND, tenant, job_id), log_key(tenant, job_id))
        if not removed:
            raise _not_found(response_id)

    async def aclose(self) -> None:
        """Stop listening."""
        await self._notices.aclose()

    @translated("responses")
    async def _end(self, tenant: str, job_id: str, at: int) -> None:
        record = record_of_job(KIND, tenant, job_id)
        if not await self._redis.exists(record):
            raise _not_found(f"{_PREFIX}{job_id}")
        await self._cancel(
            keys=[
                key_of(KIND, "job", job_id),
                log_key(tenant, job_id),
                record,
                key_of(KIND, "stream"),
                key_of(KIND, "delayed"),
                CANCELLED,
            ],
            args=[GROUP, job_id, encode_fact(Ended(status="cancelled", at=at))],
        )


def _fields(stored: StoredResponse, keep_s: int) -> dict[str, bytes]:
    return {
        "head": stored.head,
        "items": stored.items,
        "history": msgspec.msgpack.encode(stored.history),
        "background": b"1" if stored.background else b"0",
        "mark": stored.mark.encode(),
        "keep_s": b"%d" % keep_s,
    }


def _job_id(response_id: str) -> str:
    """The part of an id that is a key; anything that is none cannot be found."""
    job_id = response_id.removeprefix(_PREFIX)
    if len(job_id) != 32 or not _HEX.issuperset(job_id) or job_id == response_id:
        raise _not_found(response_id)
    return job_id


def _other_body() -> Conflict:
    return Conflict("this Idempotency-Key was used with another request body", "Idempotency-Key")


def _not_found(response_id: str) -> NotFound:
    return NotFound(f"no response with the id {response_id[:64]!r}", "response_id")
