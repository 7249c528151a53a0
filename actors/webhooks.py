"""Tells endpoints outside that a response or a batch has ended: durable, signed, tried again, never inwards.

A webhook is a job like any other: `WebhookOutbox` enqueues it just before the result is final, `WebhookSender` runs it
and sends nothing until the result is there, so that a crash between the two loses nothing and tells nothing untrue.
Where it may go is settled by the address that the connection is made to, not by the name.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Literal

import httpx
import msgspec
from pydantic import BaseModel, ConfigDict, Field, field_validator

from actors.errors import InvalidRequest, NotFound, Unavailable
from actors.policies.webhooks import KIND, EventType, WebhookTask, all_public, headers, secret_bytes
from actors.stores.job_records import Lease
from actors.stores.jobs import JobLog
from actors.telemetry import logger

_TIMEOUT_S = 15.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 5.0, 3600.0
_GONE = 410  # the endpoint wants no more
_log = logger("webhooks")

Ended = Callable[[str, str], Awaitable[bool]]


class WebhookEndpoint(BaseModel):
    """Who is told."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str = Field(pattern=r"^https?://[^\s@]+$", description="Where events are POSTed.")
    secret: str = Field(
        pattern=r"^env:[A-Z_][A-Z0-9_]*$",
        description="Environment variable of the runner that holds the signing secret, whsec_ and base64.",
    )
    tenant: str = Field(description="Whose events; a tenant never hears of another's.")
    events: tuple[EventType, ...] = Field(default=(), description="Which; none named: all.")

    def key(self) -> bytes:
        """The signing key.

        Raises:
            ValueError: the variable is not set, or holds no secret.
        """
        return secret_bytes(os.environ.get(self.secret.removeprefix("env:"), ""))


class WebhookConfig(BaseModel):
    """All webhooks."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    endpoints: tuple[WebhookEndpoint, ...] = Field(default=(), description="Who is told.")
    allow_private: bool = Field(
        default=False, description="Also send to loopback and private addresses, and without TLS."
    )
    give_up_after_s: float = Field(default=259_200, gt=0, description="How long an event is tried.")

    @field_validator("endpoints")
    @classmethod
    def _one_of_a_url(cls, endpoints: tuple[WebhookEndpoint, ...]) -> tuple[WebhookEndpoint, ...]:
        if len({(one.tenant, one.url) for one in endpoints}) < len(endpoints):
            raise ValueError("a url is named twice for one tenant")
        return endpoints


class WebhookOutbox:
    """Enqueues events.

    Args:
        jobs: the log.
        config: who is told.
    """

    def __init__(self, jobs: JobLog, config: WebhookConfig) -> None:
        self._jobs = jobs
        self._endpoints = config.endpoints

    async def announce(self, tenant: str, event: EventType, subject: str) -> None:
        """Enqueue an event that is about to be true; doing it twice is once.

        Raises:
            Unavailable, StorageFull: it may or may not be enqueued.
        """
        for endpoint in self._endpoints:
            if endpoint.tenant == tenant and (not endpoint.events or event in endpoint.events):
                task = WebhookTask(
                    event_id=f"evt_{uuid.uuid4().hex}",
                    type=event,
                    subject=subject,
                    url=endpoint.url,
                    created_at=int(time.time()),
                )
                once = f"{subject} {event} {endpoint.url}"
                await self._jobs.enqueue(KIND, tenant, msgspec.to_builtins(task), idempotency_key=once)


class WebhookSender:
    """Sends events; what a job of kind `webhook` does.

    Args:
        config: who is told.
        has_ended: whether a subject of a tenant is final.
    """

    kind = KIND
    subject = "this webhook"

    def __init__(self, config: WebhookConfig, has_ended: Ended) -> None:
        self._config = config
        self._has_ended = has_ended
        # No proxy of the environment: it would make the connection, to wherever the name says then.
        self._http = httpx.AsyncClient(timeout=_TIMEOUT_S, follow_redirects=False, trust_env=False)

    def task(self, lease: Lease) -> tuple[Lease, WebhookTask]:
        """What one job asks for."""
        return lease, msgspec.convert(lease.payload, WebhookTask)

    async def run(
        self, tenant: str, job: tuple[Lease, WebhookTask]
    ) -> Literal["sent", "unwanted", "withdrawn"]:
        """Send one event.

        Raises:
            Unavailable: not yet; it is tried again.
            InvalidRequest: it may not be sent.
        """
        lease, task = job
        endpoint = next(
            (one for one in self._config.endpoints if (one.tenant, one.url) == (tenant, task.url)), None
        )
        if endpoint is None:
            return "unwanted"  # it was taken out of the configuration
        try:
            if not await self._has_ended(tenant, task.subject):
                raise Unavailable("the result is not final yet", retry_after_s=1.0)
        except NotFound:
            return "withdrawn"  # deleted meanwhile
        body = msgspec.json.encode(
            {
                "id": task.event_id,
                "object": "event",
                "created_at": task.created_at,
                "type": task.type,
                "data": {"id": task.subject},
            }
        )
        signed = headers(endpoint.key(), task.event_id, int(time.time()), body)
        status = await self._post(task.url, body, signed, lease.failures)
        return "unwanted" if status == _GONE else "sent"

    async def give_up(self, tenant: str, job: tuple[Lease, WebhookTask], message: str) -> None:
        """Nobody else is concerned: the dead letter says it."""
        _log.warning("webhook_given_up", tenant=tenant, type=job[1].type, reason=message)

    async def aclose(self) -> None:
        """End the connections."""
        await self._http.aclose()

    async def _post(self, url: str, body: bytes, signed: dict[str, str], failures: int) -> int:
        pause_s = min(_FIRST_PAUSE_S * 2.0 ** min(failures, 20), _LONGEST_PAUSE_S)
        target, host, extensions = await self._target(httpx.URL(url))
        sent = {**signed, "host": host, "content-type": "application/json", "user-agent": "shoal-webhooks/1"}
        try:
            response = await self._http.post(target, content=body, headers=sent, extensions=extensions)
        except httpx.HTTPError as error:
            name = type(error).__name__
            raise Unavailable(f"the endpoint cannot be reached: {name}", retry_after_s=pause_s) from None
        if response.status_code != _GONE and not response.is_success:
            raise Unavailable(f"the endpoint answered {response.status_code}", retry_after_s=pause_s)
        return response.status_code

    async def _target(self, url: httpx.URL) -> tuple[httpx.URL, str, dict[str, str]]:
        """Where to connect: the very address that was looked at, under the name that it was found by."""
        if not self._config.allow_private and url.scheme != "https":
            raise InvalidRequest("webhooks are sent by https only")
        port = url.port or (443 if url.scheme == "https" else 80)
        try:
            found = await asyncio.get_running_loop().getaddrinfo(url.host, port, type=socket.SOCK_STREAM)
        except OSError:
            raise Unavailable(
                "the endpoint's name cannot be resolved", retry_after_s=_FIRST_PAUSE_S
            ) from None
        addresses = [str(entry[4][0]) for entry in found]
        if not self._config.allow_private and not all_public(addresses):
            raise InvalidRequest("webhooks are not sent to private addresses")
        target = url.copy_with(host=addresses[0])
        return target, url.netloc.decode(), {"sni_hostname": url.host}
