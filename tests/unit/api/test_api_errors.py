from __future__ import annotations

import json
from typing import Annotated

import pytest
from fastapi import Form, Query, UploadFile
from pydantic import BaseModel

from actors.errors import ReplicaGone

CHAT = "/v1/chat/completions"
GOOD = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def error_of(answer) -> dict:
    error = answer.json()["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    return error


async def test_an_unknown_route_is_openais_404(http):
    answer = await http.get("/v1/nowhere")
    assert answer.status_code == 404
    assert error_of(answer)["code"] == "not_found"


async def test_a_wrong_method_is_405_and_names_the_right_one(http):
    answer = await http.get(CHAT)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert "POST" in error_of(answer)["message"]


async def test_a_trailing_slash_is_not_redirected(http):
    assert (await http.post(f"{CHAT}/", json=GOOD)).status_code == 404


@pytest.mark.parametrize("body", [b"{", b'{"model": }', b"\xff\xfe", b'"\\ud800"'])
async def test_broken_json_is_400(http, body):
    answer = await http.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert "not valid JSON" in error_of(answer)["message"]


async def test_an_empty_body_is_400(http):
    answer = await http.post(CHAT, headers={"content-type": "application/json"})
    assert (answer.status_code, error_of(answer)["message"]) == (400, "a JSON request body is required")


@pytest.mark.parametrize("body", ["[]", "3", "null", '"x"'])
async def test_a_body_that_is_no_object_is_400(http, body):
    answer = await http.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert "must be a JSON object" in error_of(answer)["message"]


@pytest.mark.parametrize("content_type", ["text/plain", "multipart/form-data", ""])
async def test_another_content_type_is_400_and_names_the_right_one(http, content_type):
    answer = await http.post(CHAT, content=json.dumps(GOOD), headers={"content-type": content_type})
    assert answer.status_code == 400
    assert "application/json" in error_of(answer)["message"]


async def test_a_charset_and_a_json_suffix_are_json(http):
    for content_type in ("application/json; charset=utf-8", "application/vnd.x+json"):
        answer = await http.post(CHAT, content=json.dumps(GOOD), headers={"content-type": content_type})
        assert answer.status_code == 200


async def test_validation_is_400_with_the_path_and_never_422(http):
    bad = {**GOOD, "messages": [{"role": "user", "content": "x"}, {"role": "robot", "content": "y"}]}
    answer = await http.post(CHAT, json=bad)
    assert answer.status_code == 400
    assert error_of(answer) == {
        "message": "'messages[1].role' must be 'system', 'developer', 'user', 'assistant' or 'tool'",
        "type": "invalid_request_error",
        "param": "messages[1].role",
        "code": "invalid_request",
    }


async def test_a_part_that_is_down_always_says_when_to_retry(http, gateway):
    def down(_call):
        raise ReplicaGone("the replica went away during the call")

    gateway.answer = down
    answer = await http.post(CHAT, json=GOOD)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


async def test_an_unexpected_exception_is_500_with_a_fixed_text_and_is_logged_without_its_message(
    http, gateway, capsys
):
    def broken(_call):
        raise RuntimeError("the canary prompt at 10.0.0.7")

    gateway.answer = broken
    answer = await http.post(CHAT, json=GOOD)
    assert answer.status_code == 500
    assert error_of(answer) == {
        "message": "internal error", "type": "server_error", "param": None, "code": "internal_error",
    }  # fmt: skip
    assert answer.headers["x-request-id"]
    logged = "".join(capsys.readouterr())
    assert "unexpected_error" in logged
    assert "RuntimeError" in logged
    assert "canary" not in logged


async def test_what_a_caller_sent_comes_back_short(http):
    answer = await http.post(CHAT, json={**GOOD, "k" * 100_000: 1})
    assert answer.status_code == 400
    assert len(answer.text) < 1000


async def test_deep_json_is_400_and_no_crash(http):
    answer = await http.post(
        CHAT,
        content=b'{"model":"m","messages":' + b"[" * 100_000,
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == 400


class Native(BaseModel):
    size: int


async def native(body: Native) -> Native:
    return body


async def paged(limit: Annotated[int, Query(ge=1)]) -> int:
    return limit


async def upload(file: UploadFile, purpose: Annotated[str, Form()]) -> str:
    return f"{purpose} {file.size}"


@pytest.fixture
def fastapis_own(app):
    """Routes that let FastAPI parse."""
    app.post("/native")(native)
    app.get("/paged")(paged)
    app.post("/v1/files")(upload)
    # In front of whatever else has the path.
    app.router.routes.insert(0, app.router.routes.pop())


@pytest.mark.usefixtures("fastapis_own")
@pytest.mark.parametrize(
    ("request_", "param", "words"),
    [
        (
            {"method": "POST", "url": "/native", "json": {"size": "x"}},
            "size",
            "'size' must be a valid integer",
        ),
        ({"method": "POST", "url": "/native", "json": {}}, "size", "'size' is required"),
        ({"method": "POST", "url": "/native", "content": "{"}, None, "the request body"),
        ({"method": "POST", "url": "/native"}, None, "the request body is required"),
        ({"method": "GET", "url": "/paged?limit=0"}, "limit", "'limit' must be greater than or equal to 1"),
        ({"method": "POST", "url": "/v1/files", "data": {"purpose": "x"}}, "file", "'file' is required"),
    ],
)
async def test_what_fastapi_validates_is_400_in_the_same_shape(http, request_, param, words):
    answer = await http.request(**request_)
    assert answer.status_code == 400
    assert error_of(answer)["param"] == param
    assert words in error_of(answer)["message"]


@pytest.mark.usefixtures("fastapis_own")
async def test_an_upload_over_its_limit_is_413_though_fastapi_was_parsing_it(http):
    good = await http.post("/v1/files", files={"file": b"x" * 14_000_000}, data={"purpose": "p"})
    assert good.json() == "p 14000000"
    answer = await http.post("/v1/files", files={"file": b"x" * 21_000_000}, data={"purpose": "p"})
    assert answer.status_code == 413
    assert error_of(answer)["code"] == "payload_too_large"
