from __future__ import annotations

import asyncio
import json
import re

import httpx
import pytest
import uvicorn
from ray.serve._private.http_util import RequestIdMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from actors.types import TokenDelta, Usage
from app.api.middleware import RequestEdge, proxy_middlewares

CHAT = "/v1/chat/completions"
GOOD = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/healthz", 200),
        ("GET", "/nowhere", 404),
        ("GET", CHAT, 405),
        ("POST", CHAT, 400),
        ("GET", "/v1/models", 200),
    ],
)
async def test_every_answer_has_its_id_and_its_stages(http, method, path, status):
    answer = await http.request(method, path)
    assert answer.status_code == status
    assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])
    assert re.search(r"other;dur=\d+\.\d\d", answer.headers["server-timing"])


async def test_the_stages_of_a_whole_answer_add_up_to_its_time(http, gateway, play, say):
    released = asyncio.Event()
    gateway.answer = lambda _call: play([*say("a b")[:1], released, *say("a b")[1:]])
    # The request takes a part of this before it decodes.
    asyncio.get_running_loop().call_later(0.3, released.set)
    answer = await http.post(CHAT, json=GOOD)
    stages = {k: float(v) for k, v in re.findall(r"(\w+);dur=([\d.]+)", answer.headers["server-timing"])}
    assert 200 < stages["decode"] < 1000
    assert all(spent < 200 for stage, spent in stages.items() if stage != "decode")
    assert "auth" in stages


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("abc-123", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("a b", False),
        ("a\u00e9", False),
        ("", False),
    ],
)
async def test_a_request_id_is_kept_only_when_it_is_harmless(raw_call, given, kept):
    call = raw_call("/healthz", method="GET", headers=[(b"x-request-id", given.encode())])
    await call.task
    assert (call.headers["x-request-id"] == given) is kept


@pytest.mark.parametrize(
    "host", ["a/b", "a/v1/models?x=", "a?b", "a#b", "a@b", "a b", "[::1", "a:b", "", "a\\b", "a:123456"]
)
async def test_a_poisoned_host_is_400(raw_call, host):
    call = raw_call("/healthz", method="GET")
    await call.task
    call = raw_call("/healthz", method="GET", headers=[])
    call.scope["headers"] = [(b"host", host.encode())]
    await call.task
    assert call.status == 400
    assert json.loads(call.body)["error"]["param"] == "Host"


@pytest.mark.parametrize("host", ["shoal", "shoal.example:8000", "127.0.0.1:8000", "[::1]:8000", "my_host-1"])
async def test_an_honest_host_passes(raw_call, host):
    call = raw_call("/healthz", method="GET")
    call.scope["headers"] = [(b"host", host.encode())]
    await call.task
    assert call.status == 200


@pytest.mark.parametrize(
    "headers",
    [
        [(b"host", b"other")],
        [(b"content-length", b"2"), (b"content-length", b"3")],
        [(b"content-length", b"2"), (b"transfer-encoding", b"chunked")],
        [(b"content-length", b"+2")],
        [(b"content-length", b"2, 2")],
    ],
)
async def test_a_malformed_head_is_400(raw_call, headers):
    call = raw_call(CHAT, GOOD, headers=headers)
    await call.task
    assert call.status == 400


async def test_a_target_that_is_no_path_is_400(raw_call):
    call = raw_call("http://other/v1/models", method="GET")
    await call.task
    assert call.status == 400


async def test_14_mb_are_413_whatever_content_length_says(raw_call, http):
    chunks = [b"x" * 1_000_000 for _ in range(14)]
    call = raw_call(CHAT, chunks=chunks)
    await call.task
    assert call.status == 413
    assert json.loads(call.body)["error"] == {
        "message": "the body is larger than 10000000 bytes, the most allowed here",
        "type": "invalid_request_error",
        "param": None,
        "code": "payload_too_large",
    }
    assert len(chunks) == 3  # reading stopped at the limit
    assert (
        await http.post(CHAT, content=b"x" * 14_000_000, headers={"content-type": "application/json"})
    ).status_code == 413


async def test_a_declared_size_over_the_limit_is_413_with_the_first_byte(raw_call):
    chunks = [b"x", b"y"]
    call = raw_call(CHAT, chunks=chunks, headers=[(b"content-length", b"14000000")])
    await call.task
    assert (call.status, chunks) == (413, [b"y"])


async def test_an_upload_has_its_own_limit(app, raw_call):
    async def upload(request: Request) -> Response:
        return JSONResponse({"size": len(await request.body())})

    # In front: the real route parses multipart.
    app.router.routes.insert(0, Route("/v1/files", upload, methods=["POST"]))
    call = raw_call("/v1/files", chunks=[b"x" * 14_000_000])
    await call.task
    assert (call.status, json.loads(call.body)) == (200, {"size": 14_000_000})
    call = raw_call("/v1/files", chunks=[b"x" * 11_000_000, b"x" * 11_000_000])
    await call.task
    assert call.status == 413


async def test_metrics_have_the_route_template_and_known_models_only(http, recorded):
    await http.post(CHAT, json=GOOD)
    await http.post(CHAT, json={**GOOD, "model": "absent"})
    await http.get("/v1/models/some-id-of-a-caller")
    await http.get("/some/made-up/path")
    counted = [labels for name, labels in recorded if name == "shoal_requests_total"]
    assert counted == [
        {"route": CHAT, "model": "m", "status": "200"},
        {"route": CHAT, "model": "", "status": "404"},
        {"route": "/v1/models/{model:path}", "model": "", "status": "404"},
        {"route": "unmatched", "model": "", "status": "404"},
    ]
    assert [labels for name, labels in recorded if name == "shoal_request_seconds"] == counted


async def test_a_stream_that_fails_late_is_counted_by_its_error(http, gateway, play, say, recorded):
    gateway.answer = lambda _call: play(say("a b")[:-1])
    await http.post(CHAT, json={**GOOD, "stream": True})
    assert recorded[0][1] == {"route": CHAT, "model": "m", "status": "503"}


async def test_a_client_that_left_is_499_in_the_log(raw_call, gateway, play, say, capsys):
    gateway.answer = lambda _call: play([*say("one two")[:1], asyncio.Event()])
    call = raw_call(CHAT, {**GOOD, "stream": True}, headers=[(b"x-request-id", b"my-id")])
    await call.until(3)
    call.leave.set()
    await call.task
    logged = "".join(capsys.readouterr())
    assert "client_left" in logged
    assert "499" in logged
    assert "my-id" in logged


async def test_requests_do_not_share_their_state(app):
    shared: dict = {}
    seen = []

    async def inner(scope, receive, send):
        seen.append(scope["state"]["request_context"])

    edge = RequestEdge(inner)
    for _ in range(2):
        await edge({"type": "http", "path": "/", "headers": [], "state": shared, "app": app}, None, None)
    assert seen[0] is not seen[1]
    assert shared == {}


async def test_in_front_of_serves_own_middleware_the_id_is_harmless_and_comes_once(app):
    served = RequestIdMiddleware(app)
    for middleware in proxy_middlewares():
        served = middleware.cls(served, *middleware.args, **middleware.kwargs)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(served), base_url="http://shoal") as client:
        good = await client.get("/healthz", headers={"x-request-id": "my-id"})
        assert good.headers.get_list("x-request-id") == ["my-id"]
        bad = await client.get("/healthz", headers={"x-request-id": "<script>"})
        assert re.fullmatch(r"[0-9a-f]{32}", bad.headers["x-request-id"])
        routes = await client.get("/-/routes")
        assert (routes.status_code, routes.json()["error"]["code"]) == (404, "not_found")


@pytest.fixture
async def server(app):
    """The application behind a real server on a loopback port."""
    config = uvicorn.Config(app, port=0, lifespan="off", log_config=None, access_log=False)
    server = uvicorn.Server(config)
    task = asyncio.ensure_future(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    await task


async def test_a_real_client_gets_its_413_and_its_401_though_it_sent_14_mb(server, http):
    async with httpx.AsyncClient(base_url=server, headers=http.headers) as client:
        body, kind = b"x" * 14_000_000, {"content-type": "application/json"}
        assert (await client.post(CHAT, content=body, headers=kind)).status_code == 413
        assert (
            await client.post(CHAT, content=body, headers={**kind, "authorization": "no"})
        ).status_code == 401
        assert (await client.get("/healthz")).status_code == 200


async def test_a_real_connection_that_breaks_closes_the_stream(server, http, gateway, play, say):
    gateway.answer = lambda _call: play([*say("one two")[:1], asyncio.Event()])
    async with (
        httpx.AsyncClient(base_url=server, headers=http.headers) as client,
        client.stream("POST", CHAT, json={**GOOD, "stream": True}) as answer,
    ):
        async for line in answer.aiter_lines():
            if '"one "' in line:
                break
        assert not gateway.streams[0].closed
    for _ in range(100):
        await asyncio.sleep(0.01)
        if gateway.streams[0].closed:
            return
    pytest.fail("the stream is still open a second after its client left")


async def test_a_real_server_streams_each_event_as_it_comes(server, http, gateway, play):
    more = asyncio.Event()
    usage = Usage(prompt_tokens=1, completion_tokens=2)
    gateway.answer = lambda _call: play(
        [
            TokenDelta(choice=0, text="one"),
            more,
            TokenDelta(choice=0, text="two", finish_reason="stop", usage=usage),
        ]
    )
    async with (
        httpx.AsyncClient(base_url=server, headers=http.headers) as client,
        client.stream("POST", CHAT, json={**GOOD, "stream": True}) as answer,
    ):
        lines = answer.aiter_lines()
        seen = ""
        while '"one"' not in seen:
            seen = await asyncio.wait_for(anext(lines), 2)
        more.set()
        assert "[DONE]" in "".join([line async for line in lines])
