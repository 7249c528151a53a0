"""Bad input in a caller's words: which field is wrong, how, and what is allowed.

Validators of `app.schemas` raise `wrong`; `invalid_request` turns what pydantic found into the caller's error;
`error_object` is OpenAI's shape of every error. The status is the error class's own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import PydanticCustomError

from actors.errors import InvalidRequest, ShoalError

_SHOWN_CHARS = 64  # of anything a caller sent that comes back in a message
_SHOULD = re.compile(r"^\w+ should\b")  # "Input should be", "List should have"
_PLACES = frozenset({"body", "query", "path", "header"})  # where FastAPI says a value came from
_NOT_FIELDS = frozenset({"str", "int", "float", "bool"})  # branches of a union in pydantic's location


def wrong(message: str, key: str = "") -> PydanticCustomError:
    """The error a validator raises; `message` reaches the caller as it is.

    Args:
        message: what is wrong and what is allowed.
        key: the part of the param path below the validated field: `.name` or `[3]`.
    """
    return PydanticCustomError("shoal", "{message}", {"message": message, "key": key})


def shown(value: object) -> str:
    """What the caller sent, short enough to be sent back."""
    text = str(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}…"


def error_object(error: ShoalError) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def invalid_request(errors: Sequence[Mapping[str, Any]], *, placed: bool = False) -> InvalidRequest:
    """The caller's error for what pydantic found; the first finding speaks, as with OpenAI.

    Args:
        errors: `ValidationError.errors()`.
        placed: they are FastAPI's: locations start with the place ("query", which may be a field's name too).
    """
    found = errors[0]
    context = found.get("ctx") or {}
    location = found["loc"]
    if placed and location and location[0] in _PLACES:
        location = location[1:]
    param = _param(location, str(context.get("key", "")) if found["type"] == "shoal" else "")
    return InvalidRequest(_message(found, context, param), param)


def _param(location: Sequence[str | int], key: str) -> str | None:
    path = "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}"
        for part in location
        if isinstance(part, int) or (part not in _NOT_FIELDS and "[" not in part)
    )
    return (path + key).lstrip(".")[: 2 * _SHOWN_CHARS] or None


# pydantic's kinds of error whose own words do not name the field or what is allowed
_TEMPLATES = {
    "json_invalid": "the request body is not valid JSON: {error}",
    "missing": "{name} is required",
    "model_type": "{name} must be a JSON object",
    "model_attributes_type": "{name} must be a JSON object",
    "dict_type": "{name} must be a JSON object",
    "literal_error": "{name} must be {expected}",
    "enum": "{name} must be {expected}",
}


def _message(found: Mapping[str, Any], context: Mapping[str, Any], param: str | None) -> str:
    kind, text = found["type"], str(found["msg"])
    name = f"'{param}'" if param else "the request body"
    if kind in _TEMPLATES:
        return _TEMPLATES[kind].format(name=name, **context)
    if kind == "shoal":
        return text if param is None or _last_name(param) in text else f"{name}: {text}"
    if _SHOULD.match(text):
        return f"{name} {_SHOULD.sub('must', text).replace(' after validation', '')}"
    return f"{name}: {text.removeprefix('Value error, ')}"


def _last_name(param: str) -> str:
    return param.rpartition(".")[2].partition("[")[0]
