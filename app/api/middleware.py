"""The edge of every HTTP request: identity, clock, size, malformed requests, metrics and the last resort.

Pure ASGI, around everything else that `build_api` installs. `RequestEdge` runs in the gateway's process;
`proxy_middlewares` gives Serve's own HTTP server the part that only it can do. Decides nothing about who may do
what: that is the routes' dependencies.
"""

from __future__ import annotations

import asyncio
import os
import re
import uuid

import structlog
from ray import serve
from ray.serve.exceptions import RayServeException
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from actors import telemetry
from actors.errors import InvalidRequest, NotFound, ShoalError
from app.api.context import RequestContext, log, log_unexpected
from app.api.deps import CONTEXT_KEY, gateway_of
from app.api.errors import error_response

UPLOAD_PATH = "/v1/files"
_CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
_REQUEST_ID = re.compile(r"[A-Za-z0-9-]{1,128}")
# A host name, an IPv4 or a bracketed IPv6 address, and a port: nothing that can move the path (CVE-2026-48710).
_HOST = re.compile(r"(?:[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?")


class RequestEdge:
    """Outermost middleware of the application.

    Args:
        app: what is inside.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._adds_id = not _serve_adds_the_id()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; everything but HTTP passes through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        context = RequestContext(
            request_id=request_id(headers), receive=_Body(scope, headers, receive).receive, send=send
        )
        # A copy: a server may share its state between requests.
        scope["state"] = {**scope.get("state", {}), CONTEXT_KEY: context}
        answer = _Answer(context, send, adds_id=self._adds_id)
        with structlog.contextvars.bound_contextvars(request_id=context.request_id):
            try:
                await self._serve(scope, headers, context, answer)
            except asyncio.CancelledError:  # Serve's way to say that the client left
                context.client_left = True
                raise
            finally:
                context.close()
                _record(scope, context, answer.status)

    async def _serve(self, scope: Scope, headers: Headers, context: RequestContext, answer: _Answer) -> None:
        try:
            problem = malformed(scope, headers)
            inner = self._app if problem is None else error_response(problem)
            await inner(scope, context.receive, answer.send)
        except Exception as error:
            log_unexpected(error)
            if answer.status:
                raise  # the answer has begun: the server must break the connection, not end it well
            await error_response(ShoalError("internal error"))(scope, context.receive, answer.send)


class _Answer:
    """Sends the answer, with the headers that every answer has.

    Attributes:
        status: 0 until the answer has begun.
    """

    def __init__(self, context: RequestContext, send: Send, *, adds_id: bool) -> None:
        self.status = 0
        self._adds_id = adds_id
        self._context = context
        self._send = send

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = [(b"server-timing", self._context.server_timing().encode())]
            if self._adds_id:
                own.append((b"x-request-id", self._context.request_id.encode()))
            message["headers"] = [*message.get("headers", ()), *own]
        await self._send(message)


class _Body:
    """Counts the body as it comes in and stops at the limit, whatever Content-Length says."""

    def __init__(self, scope: Scope, headers: Headers, receive: Receive) -> None:
        self._scope = scope
        self._headers = headers
        self._receive = receive
        self._seen_bytes = 0

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._seen_bytes += len(message.get("body", b""))
            self._check(self._seen_bytes)
        return message

    def _check(self, size_bytes: int) -> None:
        if not size_bytes:
            return
        limit = self._limit_bytes()
        declared = int(self._headers.get("content-length") or 0)
        if max(size_bytes, declared) > limit:
            # An HTTPException: FastAPI turns any other error while it reads a form into 400.
            raise HTTPException(413, f"the body is larger than {limit} bytes, the most allowed here")

    def _limit_bytes(self) -> int:
        config = gateway_of(self._scope["app"]).config
        is_upload = (
            self._scope["path"].removeprefix(self._scope.get("root_path", "").rstrip("/")) == UPLOAD_PATH
        )
        return config.max_upload_bytes if is_upload else config.max_body_bytes


def _serve_adds_the_id() -> bool:
    """Behind Serve's HTTP server without `proxy_middlewares`: it puts its id on the answer, ours would be a second."""
    try:
        serve.get_replica_context()
    except RayServeException:
        return False
    return _CALLBACK not in os.environ


def request_id(headers: Headers) -> str:
    """The caller's x-request-id when it is harmless, else a new one."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def malformed(scope: Scope, headers: Headers) -> InvalidRequest | None:
    """What is wrong with the head of a request, as far as the server lets it through."""
    hosts, lengths = headers.getlist("host"), headers.getlist("content-length")
    if len(hosts) > 1 or not all(_HOST.fullmatch(host) for host in hosts):
        return InvalidRequest("malformed Host header", "Host")
    if len(lengths) > 1 or not all(length.isascii() and length.isdigit() for length in lengths):
        return InvalidRequest("malformed Content-Length header", "Content-Length")
    if lengths and "transfer-encoding" in headers:
        return InvalidRequest("Content-Length and Transfer-Encoding exclude each other", "Content-Length")
    if not scope["path"].startswith("/"):
        return InvalidRequest("the request target must be a path")
    return None


def _record(scope: Scope, context: RequestContext, status: int) -> None:
    """Count the request and log the ones that went wrong."""
    if context.client_left:
        status = 499
    elif context.failure is not None:
        status = context.failure.status_code
    # The template, never the path: a path may hold ids, and every caller could make new ones.
    route = getattr(scope.get("route"), "path", "unmatched")
    seconds = context.clock.elapsed_s()
    model, label = context.model, str(status)
    telemetry.count("shoal_requests_total", route=route, model=model, status=label)
    telemetry.observe("shoal_request_seconds", seconds, route=route, model=model, status=label)
    facts = {"route": route, "model": model, "seconds": round(seconds, 3)}
    if status == 499:
        log.info("client_left", status=status, **facts)
    elif status >= 500 or not status:
        log.warning("request_failed", status=status, **facts)


# --- in front of Serve's HTTP server -----------------------------------------------------------------


class ProxyEdge:
    """Around Serve's own request-id middleware, which trusts any id and adds a second header.

    Also keeps `/-/routes`, which names every application, inside.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on with a harmless id, and its answer with one id header."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        own_id = request_id(Headers(scope=scope)).encode()
        others = [(name, value) for name, value in scope["headers"] if name.lower() != b"x-request-id"]
        scope["headers"] = [*others, (b"x-request-id", own_id)]

        async def send_once(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [pair for pair in message.get("headers", ()) if pair[0].lower() != b"x-request-id"]
                message["headers"] = [*kept, (b"x-request-id", own_id)]
            await send(message)

        inner = self._app
        if scope["path"] == "/-/routes":
            inner = error_response(NotFound("no such route"))
        await inner(scope, receive, send_once)


def proxy_middlewares() -> list[Middleware]:
    """For `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=app.api.middleware:proxy_middlewares`."""
    return [Middleware(ProxyEdge)]
