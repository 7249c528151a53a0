"""API keys: made, listed, revoked, and checked on every request, also while Redis is down.

Called by the gateway (`authenticate`) and by `shoal keys`. A key reads `sk-<id>-<secret>`: it is looked up by
its public id, and of the secret, 32 random bytes, only an HMAC-SHA-256 under the pepper is stored. What is
used while Redis is down is decided in `known_keys`; which scope an endpoint needs is the HTTP layer's to say.

Keys in Redis; no command or script spans two of them, so Redis Cluster needs no common hash tag here:

    shoal:key:<id>           hash: record (JSON of KeyRecord), digest (hex), revoked_at (unix seconds).
                             Never deleted: revoking is a mark.
    shoal:tenants            set of the tenants that ever had a key
    shoal:{<tenant>}:keys    set of key ids
    shoal:{<tenant>}:limits  JSON of Limits, over all keys of the tenant
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
from pydantic import BaseModel, ConfigDict, Field
from redis.asyncio import Redis
from redis.utils import str_if_bytes

from actors.errors import AuthenticationFailed, NotFound
from actors.policies.limits import UNLIMITED, Limits
from actors.stores.key_records import TENANT_PATTERN, KeyRecord, check_new, check_tenant, parse, record_of
from actors.stores.known_keys import CHANNEL, KnownKey, KnownKeys
from actors.stores.redis import translated
from actors.telemetry import logger
from actors.types import Principal, PriorityClass

_TENANTS = "shoal:tenants"

_log = logger("stores.keys")


class AuthConfig(BaseModel):
    """Who may call."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Literal["open", "keys"] = Field(
        default="keys", description="keys: every call needs one. open: every caller is `open_tenant`."
    )
    open_tenant: str = Field(
        default="default", pattern=f"^{TENANT_PATTERN}$", description="Tenant of all calls in open mode."
    )
    pepper_file: Path | None = Field(
        default=None,
        description="File with the secret that keys are hashed under, the same for all gateways; "
        "none: made in data_dir, for one machine.",
    )
    cache_ttl_s: float = Field(
        default=30, gt=0, le=30, description="How long a key that was read is used without reading it again."
    )
    max_stale_s: float = Field(
        default=3600, ge=0, description="How long a known key is accepted while Redis cannot be reached."
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class AuthenticatedKey:
    """Who is calling, and what they may use."""

    principal: Principal
    limits: Limits = UNLIMITED  # of this key
    tenant_limits: Limits = UNLIMITED  # of all the tenant's keys together


def open_key(config: AuthConfig) -> AuthenticatedKey:
    """The one caller of open mode, without limits."""
    return AuthenticatedKey(principal=Principal(tenant=config.open_tenant))


class KeyStore:
    """Makes, revokes and checks keys.

    While Redis answers, a revocation reaches every gateway at once, and after `cache_ttl_s` at the latest.
    While it does not, keys that this process knows are accepted for `max_stale_s`, those known as revoked or
    expired are refused, and for unknown ones there is no access.

    Args:
        redis: of `actors.stores.redis.connect`; stays its owner's to close.
        pepper: of `actors.stores.pepper.load_pepper`.
        config: how long keys are cached.
        now: local monotonic clock in seconds.
    """

    def __init__(
        self,
        redis: Redis,
        pepper: bytes,
        config: AuthConfig | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        config = config or AuthConfig()
        self._redis = redis
        self._pepper = pepper
        self._now = now
        self._known = KnownKeys(
            redis, self._read, fresh_s=config.cache_ttl_s, stale_s=config.max_stale_s, now=now
        )

    async def authenticate(self, authorization: str | None) -> AuthenticatedKey:
        """Who sent this `Authorization` header.

        Raises:
            AuthenticationFailed: no key, or one that is malformed, unknown, wrong, revoked or expired.
            Unavailable: Redis is down and this process does not know the key.
        """
        key_id, secret = parse(authorization)
        known = await self._known.get(key_id)
        digest = self._digest(secret)  # for an unknown id too: both take the same time
        if known is None or not hmac.compare_digest(digest, known.digest):
            raise AuthenticationFailed("incorrect API key")  # one message: ids cannot be tried
        if known.revoked or self._known.is_revoked(key_id):
            raise AuthenticationFailed("this API key has been revoked")
        if self._now() >= known.expires_s:
            raise AuthenticationFailed("this API key has expired")
        return AuthenticatedKey(
            principal=known.principal, limits=known.limits, tenant_limits=known.tenant_limits
        )

    async def aclose(self) -> None:
        """Stop listening for revocations."""
        await self._known.aclose()

    async def create(  # noqa: PLR0913  one argument per field of the record
        self,
        tenant: str,
        *,
        priority: PriorityClass = PriorityClass.STANDARD,
        scopes: Sequence[str] = ("inference", "documents"),
        name: str = "",
        expires_in_s: int | None = None,
        limits: Limits = UNLIMITED,
    ) -> tuple[str, KeyRecord]:
        """Make a key.

        Returns:
            The whole key, which cannot be had again, and its record.

        Raises:
            InvalidRequest: a bad tenant, scope, name or expiry.
            Unavailable, StorageFull: no key was made.
        """
        check_new(tenant, scopes, name, expires_in_s)
        key_id, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
        async with translated("keys"):
            created_at = (await self._redis.time())[0]
            record = KeyRecord(
                id=key_id,
                tenant=tenant,
                priority=PriorityClass(priority),
                scopes=tuple(scopes),
                name=name,
                limits=limits,
                created_at=created_at,
                expires_at=None if expires_in_s is None else created_at + expires_in_s,
            )
            pipe = self._redis.pipeline(transaction=False)
            pipe.sadd(_TENANTS, tenant)
            pipe.sadd(_tenant_keys(tenant), key_id)
            pipe.hset(
                _key(key_id),
                mapping={"record": msgspec.json.encode(record), "digest": self._digest(secret)},
            )
            await pipe.execute()
        _log.info("key_created", key_id=key_id, tenant=tenant)
        return f"sk-{key_id}-{secret}", record

    async def get(self, key_id: str) -> KeyRecord:
        """One key's record.

        Raises:
            NotFound: there is no such key.
        """
        async with translated("keys"):
            fields = await self._redis.hgetall(_key(key_id))
        if not fields:
            raise NotFound(f"there is no API key {key_id!r}")
        return record_of(fields)

    async def list(self, tenant: str | None = None) -> list[KeyRecord]:
        """The keys of one tenant, or of all: oldest first, revoked and expired ones included."""
        async with translated("keys"):
            names = {tenant} if tenant else await self._redis.smembers(_TENANTS)
            found: list[KeyRecord] = []
            for name in names:
                pipe = self._redis.pipeline(transaction=False)
                for key_id in await self._redis.smembers(_tenant_keys(str_if_bytes(name))):
                    pipe.hgetall(_key(str_if_bytes(key_id)))
                found += [record_of(fields) for fields in await pipe.execute() if fields]
        return sorted(found, key=lambda record: (record.created_at, record.id))

    async def revoke(self, key_id: str) -> KeyRecord:
        """End a key for good; doing so again is no error.

        Raises:
            NotFound: there is no such key.
            Unavailable, StorageFull: the key is not revoked.
        """
        await self.get(key_id)
        async with translated("keys"):
            now = (await self._redis.time())[0]
            pipe = self._redis.pipeline(transaction=False)
            pipe.hsetnx(_key(key_id), "revoked_at", str(now))
            pipe.publish(CHANNEL, key_id)
            await pipe.execute()
        self._known.revoke(key_id)
        _log.info("key_revoked", key_id=key_id)
        return await self.get(key_id)

    async def set_tenant_limits(self, tenant: str, limits: Limits) -> None:
        """Limit all the tenant's keys together; in force everywhere within `cache_ttl_s`."""
        check_tenant(tenant)
        async with translated("keys"):
            await self._redis.set(_tenant_limits(tenant), msgspec.json.encode(limits))

    async def tenant_limits(self, tenant: str) -> Limits:
        """What all the tenant's keys may use together."""
        async with translated("keys"):
            stored = await self._redis.get(_tenant_limits(tenant))
        return msgspec.json.decode(stored, type=Limits) if stored else UNLIMITED

    async def _read(self, key_id: str) -> KnownKey | None:
        read_s = self._now()
        async with translated("keys"):
            pipe = self._redis.pipeline(transaction=False)
            pipe.hgetall(_key(key_id))
            pipe.time()
            fields, (server_now, _) = await pipe.execute()
        if not fields:
            return None
        record = record_of(fields)
        left_s = float("inf") if record.expires_at is None else record.expires_at - server_now
        return KnownKey(
            principal=Principal(
                tenant=record.tenant, priority=record.priority, key_id=record.id, scopes=record.scopes
            ),
            limits=record.limits,
            tenant_limits=await self.tenant_limits(record.tenant),
            digest=fields[b"digest"].decode(),
            revoked=record.revoked_at is not None,
            expires_s=read_s + left_s,  # the machines' wall clocks are never compared
            read_s=read_s,
        )

    def _digest(self, secret: str) -> str:
        return hmac.new(self._pepper, secret.encode(), hashlib.sha256).hexdigest()


def _key(key_id: str) -> str:
    return f"shoal:key:{key_id}"


def _tenant_keys(tenant: str) -> str:
    return f"shoal:{{{tenant}}}:keys"


def _tenant_limits(tenant: str) -> str:
    return f"shoal:{{{tenant}}}:limits"
