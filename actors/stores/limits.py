"""Requests and tokens per minute, per key and per tenant, shared by all gateways.

Called by the gateway: `reserve` before the work, with the tokens it is expected to take, `settle` after it, with
what it took. The maths is `actors.policies.limits`; one Lua script per operation makes it atomic over the
up to four buckets, on Redis' clock. While Redis is down every gateway keeps to its own share of the limits.

Keys in Redis, described in `lua/limits_reserve.lua`: shoal:{<tenant>}:limit:<key id or "tenant">:<unit>. The
hash tag keeps all of one request in one slot of a Redis Cluster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn

from redis.asyncio import Redis

from actors.errors import InvalidRequest, RateLimited, StorageFull, Unavailable
from actors.policies import limits as policy
from actors.policies.limits import PERIOD_S, BucketState, Unit
from actors.stores.keys import AuthenticatedKey
from actors.stores.redis import Outage, script, translated
from actors.telemetry import logger

_PERIOD_US = round(PERIOD_S * 1e6)
_MOST_LOCAL = 10_000  # buckets kept while Redis is down

_log = logger("stores.limits")


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """One limit that a request counts against."""

    name: str  # the key in Redis
    owner: str  # "key" or "tenant", for messages
    unit: Unit
    limit: int  # per minute
    cost: int  # of this request


@dataclass(frozen=True, kw_only=True, slots=True)
class Reservation:
    """What a request has taken; give it to `settle` exactly once, however the request ends."""

    tokens: int
    buckets: tuple[Bucket, ...]  # empty: unlimited
    states: tuple[BucketState, ...]
    local: bool  # taken from this gateway's own share, since Redis was down


@dataclass(frozen=True, kw_only=True, slots=True)
class _Outcome:
    refused: Bucket | None
    wait_s: float
    states: tuple[BucketState, ...]


class LimitStore:
    """Reserves and settles.

    Args:
        redis: of `actors.stores.redis.connect`.
        expected_gateways: how many processes share the limits while Redis is down.
        now: local monotonic clock in seconds, for that time only.
    """

    def __init__(
        self, redis: Redis, *, expected_gateways: int = 1, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._reserve_script = script(redis, "limits_reserve")
        self._settle_script = script(redis, "limits_settle")
        self._local = _LocalShare(expected_gateways, now)
        self._outage = Outage(now=now)

    async def reserve(self, key: AuthenticatedKey, tokens: int, *, requests: int = 1) -> Reservation:
        """Take one request and `tokens` tokens from every limit of the key and its tenant, or nothing.

        Args:
            key: who asks.
            tokens: what it is expected to take: its prompt and the predicted output. What it takes beyond that
                is charged by `settle` and is missing from the next minute.
            requests: 0 for work whose request was counted when it was accepted.

        Raises:
            InvalidRequest: no minute would ever be enough for so many tokens.
            RateLimited: with the time after which it would pass, and the x-ratelimit-* headers.
        """
        buckets = tuple(one for one in _buckets(key, tokens, requests) if one.cost)
        for bucket in buckets:
            _check_fits(bucket)
        if not buckets:
            return Reservation(tokens=tokens, buckets=(), states=(), local=False)
        outcome, local = await self._take(buckets)
        if outcome.refused is not None:
            _refuse(outcome.refused, outcome)
        return Reservation(tokens=tokens, buckets=buckets, states=outcome.states, local=local)

    async def settle(self, reservation: Reservation, used_tokens: int) -> None:
        """Charge or give back the difference between reserved and used tokens. The request stays counted.

        Never raises for a Redis that is down: what is not given back flows back within two minutes.
        """
        difference = used_tokens - reservation.tokens
        buckets = [bucket for bucket in reservation.buckets if bucket.unit == "tokens"]
        if not buckets or difference == 0:
            return
        if reservation.local:
            self._local.settle(buckets, difference)
            return
        try:
            async with translated("limits"):
                await self._settle_script(
                    keys=[bucket.name for bucket in buckets],
                    args=[_PERIOD_US, *(arg for bucket in buckets for arg in (bucket.limit, difference))],
                )
        except (Unavailable, StorageFull):
            _log.warning("limit_unsettled", tokens=difference)

    @staticmethod
    def headers(reservation: Reservation) -> Mapping[str, str]:
        """The x-ratelimit-* headers of an answer, as of its reservation."""
        return policy.headers(reservation.states)

    async def _take(self, buckets: tuple[Bucket, ...]) -> tuple[_Outcome, bool]:
        if not self._outage.active:
            try:
                async with translated("limits"):
                    return await self._take_shared(buckets), False
            except (Unavailable, StorageFull):
                self._outage.begin()
        return self._local.take(buckets), True

    async def _take_shared(self, buckets: tuple[Bucket, ...]) -> _Outcome:
        refused, wait_us, *pairs = await self._reserve_script(
            keys=[bucket.name for bucket in buckets],
            args=[_PERIOD_US, *(arg for bucket in buckets for arg in (bucket.limit, bucket.cost))],
        )
        states = tuple(
            BucketState(
                unit=bucket.unit, limit=bucket.limit, remaining=pairs[2 * i], reset_s=pairs[2 * i + 1] / 1e6
            )
            for i, bucket in enumerate(buckets)
        )
        return _Outcome(
            refused=buckets[refused - 1] if refused else None, wait_s=wait_us / 1e6, states=states
        )


class _LocalShare:
    """The same decision in this process, over its share of each limit."""

    def __init__(self, gateways: int, now: Callable[[], float]) -> None:
        self._gateways = gateways
        self._now = now
        self._tats: dict[str, float] = {}

    def take(self, buckets: tuple[Bucket, ...]) -> _Outcome:
        now = self._now()
        verdicts = []
        for bucket in buckets:
            limit = policy.share(bucket.limit, self._gateways)
            # A request that fits the whole limit may use up the share, rather than never pass.
            cost = min(bucket.cost, limit)
            verdicts.append(policy.take(self._tats.get(bucket.name, 0.0), now, limit, cost))
        slowest = max(range(len(buckets)), key=lambda i: verdicts[i].wait_s)
        granted = all(verdict.granted for verdict in verdicts)
        if granted:
            self._tats.update({bucket.name: v.tat_s for bucket, v in zip(buckets, verdicts, strict=True)})
            self._prune(now)
        states = tuple(
            BucketState(unit=bucket.unit, limit=bucket.limit, remaining=v.remaining, reset_s=v.reset_s)
            for bucket, v in zip(buckets, verdicts, strict=True)
        )
        return _Outcome(
            refused=None if granted else buckets[slowest], wait_s=verdicts[slowest].wait_s, states=states
        )

    def settle(self, buckets: list[Bucket], difference: int) -> None:
        now = self._now()
        for bucket in buckets:
            limit = policy.share(bucket.limit, self._gateways)
            taken = min(bucket.cost, limit)
            used = min(bucket.cost + difference, limit)
            tat_s = self._tats.get(bucket.name, 0.0)
            self._tats[bucket.name] = policy.settle(tat_s, now, limit, used - taken)

    def _prune(self, now: float) -> None:
        if len(self._tats) > _MOST_LOCAL:
            self._tats = {name: tat_s for name, tat_s in self._tats.items() if tat_s > now}


def _buckets(key: AuthenticatedKey, tokens: int, requests: int) -> Iterator[Bucket]:
    prefix = f"shoal:{{{key.principal.tenant}}}:limit"
    for owner, name, limits in (
        ("key", f"{prefix}:{key.principal.key_id}", key.limits),
        ("tenant", f"{prefix}:tenant", key.tenant_limits),
    ):
        most_requests, most_tokens = limits.requests_per_minute, limits.tokens_per_minute
        if most_requests is not None:
            yield Bucket(
                name=f"{name}:requests", owner=owner, unit="requests", limit=most_requests, cost=requests
            )
        if most_tokens is not None:
            yield Bucket(name=f"{name}:tokens", owner=owner, unit="tokens", limit=most_tokens, cost=tokens)


def _check_fits(bucket: Bucket) -> None:
    if bucket.cost > bucket.limit:
        raise InvalidRequest(
            f"the request may take {bucket.cost} tokens and the limit of this {bucket.owner} is "
            f"{bucket.limit} per minute: shorten the prompt or lower the maximum of output tokens",
            param="max_completion_tokens",
        )


def _refuse(bucket: Bucket, outcome: _Outcome) -> NoReturn:
    wait = policy.duration(outcome.wait_s)
    raise RateLimited(
        f"the limit of this {bucket.owner} is {bucket.limit} {bucket.unit} per minute and is used up: "
        f"try again in {wait}",
        retry_after_s=outcome.wait_s,
        headers=policy.headers(outcome.states),
    )
