"""The logs of responses: read by anyone from any index, followed as they grow, written by the owner alone.

`actors.responder` writes with the epoch of its lease and the index that it expects: whoever has lost the lease can
write nothing, and no fact is written twice. `actors.stores.responses` reads and follows for the gateways. The key
schema stands in the scripts; what a fact means is `actors.policies.responses`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

from redis.asyncio import Redis

from actors.errors import NotFound, Unavailable
from actors.policies.responses import KIND, Ended, Fact, decode_fact, encode_fact
from actors.stores.job_records import Lease, LeaseLost
from actors.stores.jobs import DEAD_KEPT, GROUP, key_of, record_of_job
from actors.stores.notices import Inbox, Notices
from actors.stores.redis import script, translated

CANCELLED = key_of(KIND, "cancelled")  # channel: job ids, for the runners
_AT_ONCE = 512  # facts per read
_LOOK_S = 2.0  # a follower that hears nothing looks for itself
_PAUSE_S = (0.05, 2.0)  # between two tries to write while Redis is away

_WRITTEN, _LOST, _OTHER_LENGTH, _ENDED = 1, 0, 2, 3


def log_key(tenant: str, job_id: str) -> str:
    """Key of a response's log, and the channel on which its facts are published."""
    return key_of(KIND, "log", tenant, job_id)


class ResponseLog:
    """All logs.

    Args:
        redis: of `actors.stores.redis.connect`.
        notices: of this process.
    """

    def __init__(self, redis: Redis, notices: Notices) -> None:
        self._redis: Any = redis
        self._notices = notices
        self._append = script(redis, "responses_append")

    @translated("responses")
    async def read(self, tenant: str, job_id: str, start: int = 0) -> list[Fact]:
        """All facts from index `start` on."""
        found: list[Fact] = []
        while True:
            at = start + len(found)
            rows = await self._redis.lrange(log_key(tenant, job_id), at, at + _AT_ONCE - 1)
            found += map(decode_fact, rows)
            if len(rows) < _AT_ONCE:
                return found

    @translated("responses")
    async def has_ended(self, tenant: str, job_id: str) -> bool:
        """Whether a response is final.

        Raises:
            NotFound: there is none.
        """
        if not await self._exists(tenant, job_id):
            raise NotFound("the response was deleted")
        last = await self._redis.lindex(log_key(tenant, job_id), -1)
        return last is not None and isinstance(decode_fact(last), Ended)

    async def follow(self, tenant: str, job_id: str, start: int = 0) -> AsyncIterator[list[Fact]]:
        """Facts from index `start` on as they come, in lists, up to the last one; an empty list: still waiting.

        Raises:
            NotFound: it was deleted meanwhile.
            Unavailable: Redis stays away.
        """
        async with self._notices.listen(log_key(tenant, job_id)) as inbox:
            position = start
            while True:
                facts = await self.read(tenant, job_id, position)
                while facts:
                    position += len(facts)
                    yield facts
                    if isinstance(facts[-1], Ended):
                        return
                    facts = await _heard(inbox, position)
                if not await self._exists(tenant, job_id):
                    raise NotFound("the response was deleted")
                yield []
                await _heard_something(inbox)

    async def append(
        self,
        lease: Lease,
        start: int,
        facts: Sequence[Fact],
        outcome: Literal["", "done", "dead"] = "",
        error: str = "",
    ) -> int:
        """Write facts behind the `start` that are there; returns how many there are now.

        Tries until Redis answers: while it is away, nobody else can take the response either. A write whose answer
        was lost is recognised and not repeated.

        Args:
            lease: the right to write.
            start: entries in the log.
            facts: what to add; the last one is `Ended` when there is an outcome.
            outcome: what becomes of the job; "": it goes on.
            error: why it is dead.

        Raises:
            LeaseLost: nothing was written.
        """
        tenant, job_id = lease.tenant, lease.job_id
        encoded = [encode_fact(fact) for fact in facts]
        keys = [
            key_of(KIND, "job", job_id),
            log_key(tenant, job_id),
            record_of_job(KIND, tenant, job_id),
            key_of(KIND, "stream"),
            key_of(KIND, "dead"),
        ]
        args = [lease.epoch, start, outcome, GROUP, lease.entry, job_id, error, DEAD_KEPT]
        pause_s, tried = _PAUSE_S[0], False
        while True:
            try:
                async with translated("responses"):
                    what, length = await self._append(keys=keys, args=[*args, *encoded])
                break
            except Unavailable:
                tried = True  # it may have been written
                await asyncio.sleep(pause_s * (0.5 + random.random()))
                pause_s = min(2 * pause_s, _PAUSE_S[1])
        written = start + len(facts)
        if what == _WRITTEN or (tried and what in (_OTHER_LENGTH, _ENDED) and length == written):
            return written
        raise LeaseLost

    async def _exists(self, tenant: str, job_id: str) -> bool:
        async with translated("responses"):
            return bool(await self._redis.exists(record_of_job(KIND, tenant, job_id)))


async def _heard(inbox: Inbox, position: int) -> list[Fact]:
    """Facts from `position` on that came by notice, the first one waited for; empty: read the log."""
    first = await inbox.get(_LOOK_S)
    facts: list[Fact] = []
    for notice in [*([first] if first is not None else []), *inbox.ready()]:
        index, _, fact = notice.partition(b" ")
        if int(index) == position + len(facts):
            facts.append(decode_fact(fact))
        elif int(index) > position:
            return facts  # one was lost: what is behind it stands in the log
    return facts


async def _heard_something(inbox: Inbox) -> None:
    """Return when there may be something to read."""
    await inbox.get(_LOOK_S)
