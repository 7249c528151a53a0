"""A gateway without actors, and clients of the HTTP application around it, all in this process."""

from __future__ import annotations

import asyncio
import json
import math
import struct
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio
from fastapi import FastAPI

from actors.errors import AuthenticationFailed, ModelNotFound
from actors.types import Embeddings, GenerationCall, ModelCard, Passage, Principal, TokenDelta, Usage
from app.api import build_api
from app.api.deps import gateway_service

KEY = "sk-test-secret"


class FakeStream:
    """Plays a list: deltas are given, exceptions raised, events waited for."""

    expires_at = math.inf

    def __init__(self, items: Iterable[Any], passages: tuple[Passage, ...] = (), headers: dict | None = None):
        self.request_id = "r1"
        self.passages = passages
        self.headers = headers or {}
        self.closed = 0
        self._items = iter(items)

    def __aiter__(self) -> FakeStream:
        return self

    async def __anext__(self) -> TokenDelta:
        for item in self._items:
            if isinstance(item, BaseException):
                raise item
            if isinstance(item, asyncio.Event):
                await item.wait()
                continue
            await asyncio.sleep(0)
            return item
        raise StopAsyncIteration

    async def follow(self, write) -> None:
        async for delta in self:
            if (pending := write([delta])) is not None:
                await pending

    async def aclose(self) -> None:
        self.closed += 1


def words(text: str, *, choice: int = 0, finish: str = "stop", usage: bool = True) -> list[TokenDelta]:
    """The text, one delta per word, then the end."""
    *before, last = text.split(" ")
    pieces = [*(f"{piece} " for piece in before), last]
    deltas = [TokenDelta(choice=choice, text=piece, token_ids=(1,)) for piece in pieces]
    total = Usage(prompt_tokens=7, completion_tokens=len(pieces), cached_tokens=2) if usage else None
    return [*deltas, TokenDelta(choice=choice, finish_reason=finish, usage=total)]


@dataclass
class FakeGateway:
    """Answers with `answer(call)`; a raised error is the gateway's."""

    answer: Callable[[GenerationCall], Any] = lambda _call: FakeStream(words("hello to you"))
    principal: Principal = field(default_factory=lambda: Principal(tenant="t1"))
    parts: dict[str, str] = field(default_factory=lambda: {"m": "ready"})
    calls: list[GenerationCall] = field(default_factory=list)
    streams: list[Any] = field(default_factory=list)
    embedded: list[Any] = field(default_factory=list)
    config: Any = field(
        default_factory=lambda: SimpleNamespace(
            max_body_bytes=10_000_000, max_upload_bytes=20_000_000, expose_docs=False
        )
    )

    async def authenticate(self, authorization, clock):
        clock.enter("auth")
        if authorization != f"Bearer {KEY}":
            raise AuthenticationFailed("no valid key in the Authorization header")
        clock.enter("other")
        return SimpleNamespace(principal=self.principal)

    async def generate(self, caller, call, clock):
        self.calls.append(call)
        if call.model == "absent":
            raise ModelNotFound("no model is named 'absent'", "model")
        clock.enter("decode")
        answer = self.answer(call)
        stream = await answer if asyncio.iscoroutine(answer) else answer
        self.streams.append(stream)
        return stream

    async def embed(self, caller, model, texts, clock, dimensions=None):
        self.embedded.append(texts)
        width = dimensions or 4
        rows = [struct.pack(f"<{width}f", *([index + 0.5] * width)) for index in range(len(texts))]
        return Embeddings(vectors=b"".join(rows), dimensions=width, tokens=3 * len(texts))

    async def models(self):
        return [ModelCard(name="m", context_tokens=4096, tokenizer="scripted"), self._slashed]

    _slashed = ModelCard(name="org/m", context_tokens=0, tokenizer="")

    async def ready(self):
        return self.parts


@pytest.fixture
def gateway() -> FakeGateway:
    return FakeGateway()


@pytest.fixture
def app(gateway: FakeGateway) -> FastAPI:
    app = build_api()
    app.dependency_overrides[gateway_service] = lambda: gateway
    return app


@pytest_asyncio.fixture
async def http(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """A bare client with a good key."""
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app),
        base_url="http://shoal",
        headers={"authorization": f"Bearer {KEY}"},
    ) as client:
        yield client


@pytest_asyncio.fixture
async def client(app: FastAPI) -> AsyncIterator[openai.AsyncOpenAI]:
    """The official client."""
    async with openai.AsyncOpenAI(
        api_key=KEY,
        base_url="http://shoal/v1",
        max_retries=0,
        http_client=httpx.AsyncClient(transport=httpx.ASGITransport(app)),
    ) as client:
        yield client


class RawCall:
    """One ASGI call whose client can be watched while it streams, and can leave."""

    def __init__(
        self, app: Any, path: str, body: Any = None, *, headers=(), method="POST", chunks=None
    ) -> None:
        self.sent: list[dict] = []
        self.leave = asyncio.Event()
        self._chunks = chunks or [json.dumps(body).encode() if body is not None else b""]
        self._moved = asyncio.Condition()
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
            "headers": [(b"host", b"shoal"), (b"content-type", b"application/json"),
                        (b"authorization", f"Bearer {KEY}".encode()), *headers],
            "path": path, "raw_path": path.encode(), "query_string": b"", "server": ("shoal", 80),
            "client": ("127.0.0.1", 1), "root_path": "",
        }  # fmt: skip
        self.scope = scope
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def _receive(self) -> dict:
        if self._chunks:
            chunk = self._chunks.pop(0)
            return {"type": "http.request", "body": chunk, "more_body": bool(self._chunks)}
        await self.leave.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict) -> None:
        async with self._moved:
            self.sent.append(message)
            self._moved.notify_all()

    async def until(self, count: int) -> None:
        """Wait for so many messages of the answer."""
        async with self._moved:
            await asyncio.wait_for(self._moved.wait_for(lambda: len(self.sent) >= count), 5)

    @property
    def status(self) -> int:
        return self.sent[0]["status"]

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode().lower(): value.decode() for name, value in self.sent[0]["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent[1:])


@pytest.fixture
def raw_call(app: FastAPI) -> Callable[..., RawCall]:
    return lambda path, body=None, **more: RawCall(app, path, body, **more)


@pytest.fixture
def play() -> Callable[..., FakeStream]:
    """Makes a stream of hand-made items."""
    return FakeStream


@pytest.fixture
def say() -> Callable[..., list[TokenDelta]]:
    """Makes the deltas of a text."""
    return words


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, str]]]:
    """The metrics written, as (name, labels)."""
    seen: list[tuple[str, dict[str, str]]] = []
    monkeypatch.setattr(
        "actors.telemetry.count", lambda name, amount=1.0, **labels: seen.append((name, labels))
    )
    monkeypatch.setattr("actors.telemetry.observe", lambda name, value, **labels: seen.append((name, labels)))
    return seen
