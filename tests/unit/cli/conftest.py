"""A server that answers like Shoal's public API, on a real port, and the command line in front of it."""

from __future__ import annotations

import hashlib
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from typer.testing import CliRunner

from app.cli import app

POLLS = 3  # of a file until it is ingested


def refusal(status: int, message: str, code: str, **headers: str) -> JSONResponse:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return JSONResponse(
        {"error": error}, status, {name.replace("_", "-"): text for name, text in headers.items()}
    )


@dataclass
class FakeShoal:
    """Files, vector stores, models and one answer; tests look inside and change it."""

    url: str = ""
    key: str | None = None  # None: open mode
    ready: dict[str, str] = field(default_factory=lambda: {"m1": "ready"})
    models: list[dict] = field(
        default_factory=lambda: [{"id": "embedder", "type": "embedding"}, {"id": "m1"}]
    )
    answer: list[bytes] = field(default_factory=list)  # pieces of the event stream
    answer_headers: dict[str, str] = field(default_factory=dict)
    asked: list[dict] = field(default_factory=list)
    stores: dict[str, dict] = field(default_factory=dict)
    files: dict[str, tuple[str, bytes]] = field(default_factory=dict)  # id: name and bytes
    attached: dict[str, dict[str, dict]] = field(default_factory=dict)  # store: id: wire object
    failing: dict[str, str] = field(default_factory=dict)  # file name: last_error's message
    refuse: list[Response] = field(default_factory=list)  # answers to the next uploads
    uploads: int = 0
    stuck: bool = False  # nothing is ever ingested
    _ids: Any = field(default_factory=itertools.count)
    _polls: dict[str, int] = field(default_factory=dict)

    def app(self) -> Starlette:
        store, one = "/v1/vector_stores/{store}", "/v1/vector_stores/{store}/files/{file}"
        return Starlette(
            routes=[
                Route("/readyz", self.readyz),
                Route("/v1/models", self.guarded(lambda _: self.listing(self.models))),
                Route("/v1/chat/completions", self.guarded(self.chat), methods=["POST"]),
                Route("/v1/files", self.guarded(self.upload), methods=["POST"]),
                Route("/v1/files", self.guarded(self.list_uploads)),
                Route("/v1/files/{file}", self.guarded(self.delete_file), methods=["DELETE"]),
                Route("/v1/vector_stores", self.guarded(self.list_stores)),
                Route("/v1/vector_stores", self.guarded(self.make_store), methods=["POST"]),
                Route(f"{store}/files", self.guarded(self.list_files)),
                Route(f"{store}/files", self.guarded(self.attach), methods=["POST"]),
                Route(one, self.guarded(self.get_file)),
                Route(one, self.guarded(self.detach), methods=["DELETE"]),
            ]
        )

    def guarded(self, answer: Callable) -> Callable:
        async def route(request: Request) -> Response:
            if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
                return refusal(401, "incorrect API key", "invalid_api_key")
            found = answer(request)
            return await found if hasattr(found, "__await__") else found

        return route

    def listing(self, items: list[dict], request: Request | None = None) -> JSONResponse:
        """One page, two items long when the test has more: clients must follow `has_more`."""
        ids = [item["id"] for item in items]
        after = request.query_params.get("after") if request else None
        start = ids.index(after) + 1 if after else 0
        page = items[start : start + 2] if request else items
        return JSONResponse({"object": "list", "data": page, "has_more": start + len(page) < len(items)})

    async def readyz(self, _request: Request) -> Response:
        missing = [f"{name}: {state}" for name, state in self.ready.items() if state != "ready"]
        if missing:
            return refusal(503, f"not ready: {', '.join(missing)}", "unavailable", retry_after="1")
        return JSONResponse({"status": "ready", "components": self.ready})

    async def chat(self, request: Request) -> Response:
        self.asked.append(await request.json())
        if self.asked[-1]["model"] == "absent":
            return refusal(404, "the model 'absent' does not exist", "model_not_found")
        pieces = self.answer if hasattr(self.answer, "__aiter__") else iter(self.answer)
        headers = {"content-type": "text/event-stream", **self.answer_headers}
        return StreamingResponse(pieces, headers=headers)

    async def upload(self, request: Request) -> Response:
        self.uploads += 1
        assert int(request.headers["content-length"]) > 0
        async with request.form() as form:
            name, data = form["file"].filename, await form["file"].read()
        if self.refuse:
            return self.refuse.pop(0)
        file_id = f"file-{next(self._ids)}"
        self.files[file_id] = (name, data)
        return JSONResponse({"id": file_id, "filename": name, "bytes": len(data)})

    async def list_uploads(self, request: Request) -> Response:
        assert request.query_params["purpose"] == "assistants"
        hashes = {file_id: hashlib.sha256(data).hexdigest() for file_id, (_, data) in self.files.items()}
        return self.listing([{"id": file_id, "sha256": sha} for file_id, sha in hashes.items()], request)

    async def delete_file(self, request: Request) -> Response:
        if self.files.pop(request.path_params["file"], None) is None:
            return refusal(404, "no such file", "not_found")
        return JSONResponse({"deleted": True})

    async def list_stores(self, request: Request) -> Response:
        return self.listing(list(self.stores.values()), request)

    async def make_store(self, request: Request) -> Response:
        return JSONResponse(self.add_store((await request.json())["name"]))

    def add_store(self, name: str) -> dict:
        store_id = f"vs_{next(self._ids)}"
        counts = {"total": 0, "completed": 0, "in_progress": 0, "failed": 0, "cancelled": 0}
        self.stores[store_id] = {"id": store_id, "name": name, "file_counts": counts, "usage_bytes": 1234}
        self.attached[store_id] = {}
        return self.stores[store_id]

    async def list_files(self, request: Request) -> Response:
        found = [self.moved(wire) for wire in self.attached[request.path_params["store"]].values()]
        wanted = request.query_params.get("filter")
        return self.listing([wire for wire in found if wanted in {None, wire["status"]}], request)

    async def attach(self, request: Request) -> Response:
        body = await request.json()
        wire = {
            "id": body["file_id"],
            "attributes": body["attributes"],
            "status": "in_progress",
            "last_error": None,
        }
        self.attached[request.path_params["store"]][body["file_id"]] = wire
        self._polls[body["file_id"]] = 0
        return JSONResponse(wire)

    async def get_file(self, request: Request) -> Response:
        wire = self.attached[request.path_params["store"]].get(request.path_params["file"])
        return JSONResponse(self.moved(wire)) if wire else refusal(404, "no such file", "not_found")

    async def detach(self, request: Request) -> Response:
        self.attached[request.path_params["store"]].pop(request.path_params["file"], None)
        return JSONResponse({"deleted": True})

    def refuse_upload(self, status: int, message: str, code: str, **headers: str) -> None:
        """Answer the next upload so; they add up."""
        self.refuse.append(refusal(status, message, code, **headers))

    def moved(self, wire: dict) -> dict:
        """The file one poll later."""
        if wire["status"] == "in_progress" and not self.stuck:
            self._polls[wire["id"]] += 1
            wire["progress"] = self._polls[wire["id"]] / POLLS
            if self._polls[wire["id"]] >= POLLS:
                error = self.failing.get(self.files[wire["id"]][0])
                wire["status"] = "failed" if error else "completed"
                wire["last_error"] = {"code": "invalid_file", "message": error} if error else None
        return wire


class _Server(uvicorn.Server):
    def install_signal_handlers(self) -> None:
        """Signals are the test's."""


@pytest.fixture
def shoal() -> Iterator[FakeShoal]:
    """The server, in a thread."""
    fake = FakeShoal()
    config = uvicorn.Config(
        fake.app(), host="127.0.0.1", port=0, log_level="error", ws="none", lifespan="off"
    )
    server = _Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        fake.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        yield fake
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The command line, as a user would type it; returns exit code, stdout and stderr."""
    for name in ("SHOAL_URL", "SHOAL_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "160")
    return lambda *words, **env: CliRunner().invoke(app, [str(word) for word in words], env=env)


@pytest.fixture
def sse() -> Callable[..., bytes]:
    """One event of an answer."""

    def event(content: str = "", finish: str | None = None, **delta: Any) -> bytes:
        choice = {"index": 0, "delta": {"content": content, **delta}, "finish_reason": finish}
        return b"data: " + json.dumps({"choices": [choice]}, ensure_ascii=False).encode() + b"\n\n"

    return event
