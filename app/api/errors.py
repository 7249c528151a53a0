"""Errors → OpenAI's error object with the right status, for every way in which a request can fail.

`build_api` installs the handlers; the middleware uses `error_response` for what happens outside of routes.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from actors.errors import FailedEverywhere, InvalidRequest, NotFound, PayloadTooLarge, ShoalError
from app.schemas.bad_input import error_object, invalid_request

_RETRY_AFTER_S = 1.0  # of a part that is down and did not say


class MethodNotAllowed(InvalidRequest):
    """The route exists and does not answer to this method."""

    status_code = 405
    code = "method_not_allowed"


class JsonResponse(Response):
    """A JSON answer, encoded by msgspec."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Encode."""
        return msgspec.json.encode(content)


def error_response(error: ShoalError) -> Response:
    """The HTTP answer to `error`."""
    headers = dict(error.headers)
    retry_after_s = error.retry_after_s
    if isinstance(error, FailedEverywhere):
        headers["x-should-retry"] = (
            "false"  # OpenAI's clients try a 503 again by themselves: three more would die
        )
    elif retry_after_s is None and error.status_code == 503:
        retry_after_s = _RETRY_AFTER_S
    if retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(retry_after_s)))
    if error.status_code == 401:
        headers["www-authenticate"] = "Bearer"
    return JsonResponse(error_object(error), error.status_code, headers)


def from_http(error: HTTPException) -> ShoalError:
    """What Starlette raises by itself: no such route, wrong method, unreadable body."""
    headers = dict(error.headers or {})
    if error.status_code == 404:
        return NotFound("no such route; see /v1/models, /v1/chat/completions and OpenAI's reference")
    if error.status_code == 405:
        allowed = headers.get("Allow", "")
        return MethodNotAllowed(f"method not allowed; allowed: {allowed}", headers=headers)
    if error.status_code == 413:
        return PayloadTooLarge(error.detail)
    if 400 <= error.status_code < 500:
        return InvalidRequest(error.detail, headers=headers)
    return ShoalError("internal error")


async def _answer(_request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        error = from_http(error)
    elif isinstance(error, RequestValidationError):
        error = invalid_request(error.errors(), placed=True)
    return error_response(error if isinstance(error, ShoalError) else ShoalError("internal error"))


def install(app: FastAPI) -> None:
    """Register the handler. What it is not registered for reaches the middleware, which answers 500."""
    for kind in (ShoalError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _answer)
