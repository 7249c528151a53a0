"""Webhooks: what is told to whom, and how it is signed.

Pure. The events and their shape are OpenAI's; the signature is that of Standard Webhooks, so `client.webhooks.unwrap`
of the official clients verifies it. `actors.webhooks` sends them.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

KIND = "webhook"  # the job log's name for these jobs

EventType = Literal[
    "response.completed", "response.failed", "response.incomplete",
    "batch.completed", "batch.failed", "batch.expired", "batch.cancelled",
]  # fmt: skip

_SECRET_PREFIX = "whsec_"  # noqa: S105  it marks secrets, and is none


@dataclass(frozen=True, kw_only=True, slots=True)
class WebhookTask:
    """One event for one endpoint."""

    event_id: str
    type: EventType
    subject: str  # id of the response or batch
    url: str
    created_at: int  # unix seconds


def secret_bytes(secret: str) -> bytes:
    """The key in a Standard Webhooks secret: base64 behind `whsec_`.

    Raises:
        ValueError: it is none.
    """
    try:
        key = base64.b64decode(secret.removeprefix(_SECRET_PREFIX), validate=True)
    except ValueError:
        key = b""
    if not secret.startswith(_SECRET_PREFIX) or len(key) < 24:
        raise ValueError("a webhook secret is whsec_ and the base64 of at least 24 random bytes")
    return key


def headers(key: bytes, webhook_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The three headers of Standard Webhooks 1.0 (symmetric, v1).

    Args:
        key: of `secret_bytes`.
        webhook_id: the same for every try of one event.
        timestamp: unix seconds of this try.
        body: what is sent.
    """
    signed = b"%b.%d.%b" % (webhook_id.encode(), timestamp, body)
    signature = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    return {
        "webhook-id": webhook_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{signature}",
    }


def all_public(addresses: Iterable[str]) -> bool:
    """Whether every address is one of the public internet; none is not."""
    found = [ipaddress.ip_address(address.partition("%")[0]) for address in addresses]
    return bool(found) and all(one.is_global and not one.is_multicast for one in found)
