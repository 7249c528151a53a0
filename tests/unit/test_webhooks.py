"""Webhooks: signed as the official client verifies it, sent once there is something to tell, never inwards."""

import asyncio
import base64
import json
from types import SimpleNamespace

import fakeredis
import httpx
import pytest
from openai import InvalidWebhookSignatureError, OpenAI

from actors.errors import InvalidRequest, NotFound, Unavailable
from actors.policies.webhooks import KIND, WebhookTask, all_public, secret_bytes
from actors.stores.jobs import JobLog
from actors.webhooks import WebhookConfig, WebhookEndpoint, WebhookOutbox, WebhookSender

SECRET = "whsec_" + base64.b64encode(b"k" * 32).decode()
URL = "https://hooks.example.test/shoal?x=1"
TASK = WebhookTask(event_id="evt_1", type="response.completed", subject="resp_1", url=URL, created_at=7)
LEASE = SimpleNamespace(failures=0)


def config(url=URL, **fields):
    more = {"secret": "env:HOOK_SECRET", **fields.pop("endpoint", {})}
    endpoint = WebhookEndpoint(url=url, tenant="acme", **more)
    return WebhookConfig(endpoints=(endpoint,), **fields)


class Outside:
    """The internet: names with addresses, and endpoints behind them."""

    def __init__(self, monkeypatch, addresses=("93.184.216.34",)):
        self.requests: list[httpx.Request] = []
        self.status = 200
        self.ended = True

        async def getaddrinfo(_host, port, **_):
            return [(2, 1, 6, "", (address, port)) for address in addresses]

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
        monkeypatch.setenv("HOOK_SECRET", SECRET)

    def sender(self, made=None):
        async def has_ended(_tenant, _subject):
            if isinstance(self.ended, Exception):
                raise self.ended
            return self.ended

        def answer(request):
            self.requests.append(request)
            return httpx.Response(self.status, headers={"location": "http://127.0.0.1/"})

        sender = WebhookSender(made or config(), has_ended)
        sender._http = httpx.AsyncClient(transport=httpx.MockTransport(answer))
        return sender


@pytest.fixture
async def outside(monkeypatch):
    return Outside(monkeypatch)


async def test_the_official_client_verifies_and_reads_what_is_sent(outside):
    assert await outside.sender().run("acme", (LEASE, TASK)) == "sent"
    [request] = outside.requests
    client = OpenAI(api_key="x", webhook_secret=SECRET)
    event = client.webhooks.unwrap(request.content, request.headers)
    assert (event.type, event.data.id) == ("response.completed", "resp_1")
    assert request.headers["webhook-id"] == "evt_1"
    with pytest.raises(InvalidWebhookSignatureError):
        client.webhooks.verify_signature(request.content + b" ", request.headers)


async def test_the_connection_goes_to_the_address_that_was_looked_at(outside):
    await outside.sender().run("acme", (LEASE, TASK))
    [request] = outside.requests
    assert request.url.host == "93.184.216.34"
    assert request.url.raw_path == b"/shoal?x=1"
    assert request.headers["host"] == "hooks.example.test"
    assert request.extensions["sni_hostname"] == "hooks.example.test"


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.0.0.1",
        "169.254.169.254",
        "::1",
        "fe80::1%eth0",
        "fd00::1",
        "0.0.0.0",
        "::ffff:10.0.0.1",
    ],
)
async def test_nothing_is_sent_inwards_whatever_the_name_resolves_to(monkeypatch, address):
    outside = Outside(monkeypatch, addresses=("93.184.216.34", address))
    with pytest.raises(InvalidRequest, match="private"):
        await outside.sender().run("acme", (LEASE, TASK))
    assert outside.requests == []
    assert not all_public([address])
    sender = outside.sender(config(allow_private=True))
    assert await sender.run("acme", (LEASE, TASK)) == "sent"


async def test_without_tls_nothing_is_sent_outside(monkeypatch):
    outside = Outside(monkeypatch)
    url = "http://hooks.example.test/"
    task = WebhookTask(event_id="e", type="response.completed", subject="r", url=url, created_at=1)
    with pytest.raises(InvalidRequest, match="https"):
        await outside.sender(config(url=url)).run("acme", (LEASE, task))


@pytest.mark.parametrize("status", [301, 400, 500])
async def test_an_answer_that_is_no_success_is_tried_again_later_and_later(outside, status):
    outside.status = status
    pauses = []
    for failures in (0, 3, 100):
        with pytest.raises(Unavailable) as caught:
            await outside.sender().run("acme", (SimpleNamespace(failures=failures), TASK))
        pauses.append(caught.value.retry_after_s)
    assert pauses == [5, 40, 3600]
    assert len(outside.requests) == 3, "redirects are not followed"


async def test_what_is_not_final_is_not_told_and_what_is_gone_neither(outside):
    outside.ended = False
    with pytest.raises(Unavailable):
        await outside.sender().run("acme", (LEASE, TASK))
    outside.ended = NotFound("deleted")
    assert await outside.sender().run("acme", (LEASE, TASK)) == "withdrawn"
    outside.ended, outside.status = True, 410
    assert await outside.sender().run("acme", (LEASE, TASK)) == "unwanted"
    assert await outside.sender(WebhookConfig()).run("acme", (LEASE, TASK)) == "unwanted"
    assert len(outside.requests) == 1


async def test_an_event_is_enqueued_once_for_each_endpoint_of_its_tenant_that_wants_it():
    async with fakeredis.FakeAsyncRedis(protocol=2) as redis:
        jobs = JobLog(redis)
        outbox = WebhookOutbox(jobs, config(endpoint={"events": ("response.failed",)}))
        await outbox.announce("acme", "response.completed", "resp_1")
        await outbox.announce("other", "response.failed", "resp_1")
        assert (await jobs.stats(KIND)).waiting == 0
        for _ in range(2):
            await outbox.announce("acme", "response.failed", "resp_1")
        [lease] = (await jobs.lease(KIND, "a", 5)).leases
        assert json.loads(json.dumps(lease.payload))["subject"] == "resp_1"


def test_a_secret_is_standard_webhooks_or_refused():
    assert secret_bytes(SECRET) == b"k" * 32
    for wrong in ("", "whsec_", "whsec_!!!", "k" * 40, "whsec_" + base64.b64encode(b"short").decode()):
        with pytest.raises(ValueError, match="whsec_"):
            secret_bytes(wrong)
