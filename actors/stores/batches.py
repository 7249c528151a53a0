"""Batches: their records for the tenants that own them, and the checkpoints of whoever runs them.

The gateway accepts, shows and cancels (`Batches`); `actors.batcher` notes results (`BatchLog`), with the epoch of its
lease. Results themselves are files in the document store; what is noted here is which of them count. The key schema
stands in the scripts, but for

    shoal:{jobs:batch}:all:<tenant>             zset: batch ids by unix seconds of their creation
    shoal:{jobs:batch}:planned:<tenant>:<job>   set: names of files of results that may exist
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import msgspec
from redis.asyncio import Redis

from actors.errors import Conflict, InvalidRequest, NotFound, Unavailable
from actors.policies.batches import KIND, BatchTask, Status
from actors.stores.job_records import Lease, LeaseLost
from actors.stores.jobs import DEAD_KEPT, GROUP, JobLog, JobRecord, key_of, record_of_job
from actors.stores.redis import script, translated

_PREFIX = "batch_"
_HEX = frozenset("0123456789abcdef")
_PAUSE_S = (0.05, 2.0)  # between two tries to write while Redis is away
_PLANNED_S = 7 * 86_400
_KEPT = 10_000  # batches of a tenant that are listed
TIMES = (
    "in_progress_at", "finalizing_at", "completed_at", "failed_at", "expired_at", "cancelling_at", "cancelled_at",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchRecord:
    """A batch as its tenant sees it."""

    id: str
    head: bytes  # JSON: what never changes; opaque here
    status: Status
    total: int
    completed: int
    failed: int
    times: Mapping[str, int]  # unix seconds, by name as in `TIMES`
    errors: bytes = b"null"  # JSON: what makes it invalid; opaque here
    output_file_id: str | None = None
    error_file_id: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Results that are stored and not yet noted."""

    name: str
    completed: int
    failed: int
    lines: Sequence[int]  # indices in the input file


class Batches:
    """All batches.

    Args:
        redis: of `actors.stores.redis.connect`.
        jobs: where they are enqueued.
        keep_s: how long one can be retrieved after its end.
    """

    def __init__(self, redis: Redis, jobs: JobLog, keep_s: int) -> None:
        self._redis: Any = redis
        self._jobs = jobs
        self._keep_s = keep_s
        self._cancel = script(redis, "batches_cancel")

    async def accept(
        self, task: BatchTask, head: bytes, created_at: int, mark: str, idempotency_key: str | None = None
    ) -> str:
        """Take a batch; it is in the job log when this returns. Returns its id: an earlier one's, by the key.

        Raises:
            Conflict: the key was used with another body.
            Unavailable, StorageFull: it may or may not have been accepted.
        """
        tenant, job_id = task.principal.tenant, _job_id(task.batch_id)
        fields = {
            "head": head, "status": b"validating", "total": b"0", "completed": b"0", "failed": b"0",
            "keep_s": b"%d" % self._keep_s, "mark": mark.encode(),
        }  # fmt: skip
        record = JobRecord(job_id=job_id, fields=fields)
        payload: Mapping[str, Any] = msgspec.to_builtins(task)
        known = await self._jobs.enqueue(
            KIND, tenant, payload, idempotency_key=idempotency_key, record=record
        )
        async with translated("batches"):
            if known != job_id:
                first = await self._redis.hget(record_of_job(KIND, tenant, known), "mark")
                if first is not None and first.decode() != mark:
                    raise Conflict(
                        "this Idempotency-Key was used with another request body", "Idempotency-Key"
                    )
                return f"{_PREFIX}{known}"
            index = key_of(KIND, "all", tenant)
            await self._redis.zadd(index, {task.batch_id: created_at})
            await self._redis.zremrangebyrank(index, 0, -_KEPT - 1)
        return task.batch_id

    @translated("batches")
    async def get(self, tenant: str, batch_id: str) -> BatchRecord:
        """One batch.

        Raises:
            NotFound: there is none of that id, or it is another tenant's.
        """
        found = await self._find(tenant, batch_id)
        if found is None:
            raise NotFound(f"no batch with the id {batch_id[:64]!r}", "batch_id")
        return found

    @translated("batches")
    async def page(self, tenant: str, after: str | None, limit: int) -> tuple[list[BatchRecord], bool]:
        """Batches, newest first, and whether there are more.

        Raises:
            InvalidRequest: `after` is no batch of the list.
        """
        index, start = key_of(KIND, "all", tenant), 0
        if after is not None:
            rank = await self._redis.zrevrank(index, after)
            if rank is None:
                raise InvalidRequest("'after' must be the id of a batch", "after")
            start = rank + 1
        ids = await self._redis.zrange(index, start, start + limit, desc=True)
        found = [await self._find(tenant, one.decode()) for one in ids[:limit]]
        return [one for one in found if one is not None], len(ids) > limit

    async def cancel(self, tenant: str, batch_id: str, at: int) -> BatchRecord:
        """Ask for its end; it is `cancelled` once its runner has written what there is.

        Raises:
            NotFound: there is none of that id.
            Conflict: it has ended, or is about to.
        """
        record = await self.get(tenant, batch_id)
        async with translated("batches"):
            done = await self._cancel(keys=[record_of_job(KIND, tenant, _job_id(batch_id))], args=[at])
        if not done:
            raise Conflict(f"the batch is {record.status} and can no longer be cancelled", "batch_id")
        return await self.get(tenant, batch_id)

    async def _find(self, tenant: str, batch_id: str) -> BatchRecord | None:
        fields = await self._redis.hgetall(record_of_job(KIND, tenant, _job_id(batch_id)))
        if not fields:
            return None
        files = [fields[name].decode() if name in fields else None for name in _FILES]
        return BatchRecord(
            id=batch_id,
            head=fields[b"head"],
            status=cast(Status, fields[b"status"].decode()),
            total=int(fields[b"total"]),
            completed=int(fields[b"completed"]),
            failed=int(fields[b"failed"]),
            times={name: int(fields[name.encode()]) for name in TIMES if name.encode() in fields},
            errors=fields.get(b"errors", b"null"),
            output_file_id=files[0],
            error_file_id=files[1],
        )


_FILES = (b"output_file_id", b"error_file_id")


class BatchLog:
    """What an owner of a batch reads and notes.

    Args:
        redis: of `actors.stores.redis.connect`.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis
        self._progress = script(redis, "batches_progress")

    @translated("batches")
    async def state(self, lease: Lease) -> tuple[Status, int]:
        """Status and number of lines; 0 lines: not validated yet.

        Raises:
            LeaseLost: there is no such batch any more.
        """
        record = record_of_job(KIND, lease.tenant, lease.job_id)
        status, total = await self._redis.hmget(record, "status", "total")
        if status is None:
            raise LeaseLost
        return cast(Status, status.decode()), int(total)

    @translated("batches")
    async def end(self, lease: Lease) -> str | None:
        """How the batch ends, once its files are written; None before."""
        found = await self._redis.hget(record_of_job(KIND, lease.tenant, lease.job_id), "end")
        return None if found is None else str(found.decode())

    @translated("batches")
    async def has_ended(self, tenant: str, job_id: str) -> bool:
        """Whether a batch is final.

        Raises:
            NotFound: there is none.
        """
        status = await self._redis.hget(record_of_job(KIND, tenant, job_id), "status")
        if status is None:
            raise NotFound("no such batch")
        return status in (b"completed", b"failed", b"expired", b"cancelled")

    @translated("batches")
    async def done(self, lease: Lease) -> bytes:
        """A bitmap of the lines that have a result."""
        found: bytes = await self._redis.get(key_of(KIND, "done", lease.tenant, lease.job_id)) or b""
        return found

    @translated("batches")
    async def plan(self, lease: Lease, name: str) -> None:
        """Remember a file of results before it is written: one that is never noted is removed at the end, too."""
        planned = key_of(KIND, "planned", lease.tenant, lease.job_id)
        await self._redis.sadd(planned, name)
        await self._redis.expire(planned, _PLANNED_S)

    @translated("batches")
    async def planned(self, lease: Lease) -> list[str]:
        """Names of all files of results, written or not, noted or not."""
        names = await self._redis.smembers(key_of(KIND, "planned", lease.tenant, lease.job_id))
        return sorted(name.decode() for name in names)

    @translated("batches")
    async def parts(self, lease: Lease) -> list[str]:
        """Names of the files that hold results."""
        names = await self._redis.smembers(key_of(KIND, "parts", lease.tenant, lease.job_id))
        return sorted(name.decode() for name in names)

    async def note(
        self,
        lease: Lease,
        fields: Mapping[str, str | int | bytes] | None = None,
        *,
        part: Part | None = None,
        outcome: Literal["", "done", "dead"] = "",
        error: str = "",
    ) -> Status:
        """Write a checkpoint; tries until Redis answers. Returns the status of the batch.

        Raises:
            LeaseLost: somebody else owns the batch; nothing was written.
        """
        tenant, job_id = lease.tenant, lease.job_id
        keys = [
            key_of(KIND, "job", job_id),
            record_of_job(KIND, tenant, job_id),
            key_of(KIND, "parts", tenant, job_id),
            key_of(KIND, "done", tenant, job_id),
            key_of(KIND, "stream"),
            key_of(KIND, "dead"),
        ]
        pairs = [item for pair in (fields or {}).items() for item in pair]
        args: list[Any] = [lease.epoch, GROUP, lease.entry, job_id, outcome, error, DEAD_KEPT]
        args += [part.name, part.completed, part.failed] if part else ["", 0, 0]
        args += [len(pairs), *pairs, *(part.lines if part else ())]
        pause_s = _PAUSE_S[0]
        while True:
            try:
                async with translated("batches"):
                    status = await self._progress(keys=keys, args=args)
                break
            except Unavailable:
                await asyncio.sleep(pause_s * (0.5 + random.random()))
                pause_s = min(2 * pause_s, _PAUSE_S[1])
        if status is None:
            raise LeaseLost
        return cast(Status, status.decode())


def _job_id(batch_id: str) -> str:
    job_id = batch_id.removeprefix(_PREFIX)
    if len(job_id) != 32 or not _HEX.issuperset(job_id) or job_id == batch_id:
        raise NotFound(f"no batch with the id {batch_id[:64]!r}", "batch_id")
    return job_id
