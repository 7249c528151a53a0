"""What an API key is: its text form, its public record, and what may stand in one.

Used by `KeyStore` alone, and its `KeyRecord` by whoever shows keys. No secret is in a record.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from actors.errors import AuthenticationFailed, InvalidRequest
from actors.policies.limits import Limits
from actors.types import PriorityClass

SCOPES = ("inference", "documents", "admin")
TENANT_PATTERN = r"[A-Za-z0-9._-]{1,64}"  # no braces: a tenant is a hash tag in Redis keys

_KEY = re.compile(r"sk-([0-9a-f]{16})-([A-Za-z0-9_-]{43})")
_TENANT = re.compile(TENANT_PATTERN)
_NAME_CHARS = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyRecord:
    """A key as it may be shown: nothing in it opens a door."""

    id: str  # the public part
    tenant: str
    priority: PriorityClass
    scopes: tuple[str, ...]
    name: str  # what its owner calls it
    limits: Limits
    created_at: int  # unix seconds of the Redis server's clock, like all times here
    expires_at: int | None
    revoked_at: int | None = None


def record_of(fields: Mapping[Any, Any]) -> KeyRecord:
    """The record in a key's Redis hash."""
    record = msgspec.json.decode(fields[b"record"], type=KeyRecord)
    revoked_at = fields.get(b"revoked_at")
    return record if revoked_at is None else replace(record, revoked_at=int(revoked_at))


def parse(authorization: str | None) -> tuple[str, str]:
    """The id and the secret in an `Authorization` header.

    Raises:
        AuthenticationFailed: there is no key in it.
    """
    if not authorization:
        raise AuthenticationFailed("no API key: send it as `Authorization: Bearer sk-...`")
    scheme, _, key = authorization.strip().partition(" ")
    match = _KEY.fullmatch(key.strip())
    if scheme.lower() != "bearer" or match is None:
        raise AuthenticationFailed("malformed API key: send it as `Authorization: Bearer sk-...`")
    return match[1], match[2]


def check_tenant(tenant: str) -> None:
    """Refuse what cannot name a tenant."""
    if not _TENANT.fullmatch(tenant):
        raise InvalidRequest(
            "tenant must be 1 to 64 letters, digits, dots, underscores or dashes", param="tenant"
        )


def check_new(tenant: str, scopes: Sequence[str], name: str, expires_in_s: int | None) -> None:
    """Refuse a key that may not be made."""
    check_tenant(tenant)
    unknown = sorted(set(scopes) - set(SCOPES))
    if unknown or not scopes:
        raise InvalidRequest(
            f"scopes must be one or more of {', '.join(SCOPES)}; got {', '.join(unknown) or 'none'}",
            param="scopes",
        )
    if len(name) > _NAME_CHARS or not name.isprintable():
        raise InvalidRequest(f"name must be at most {_NAME_CHARS} printable characters", param="name")
    if expires_in_s is not None and expires_in_s < 1:
        raise InvalidRequest("expires_in_s must be at least 1, or left out", param="expires_in_s")
