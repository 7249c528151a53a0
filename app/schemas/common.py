"""What all wire models share: their base class, bounds on free JSON, text or token ids, ids and usage.

Every module of `app.schemas` builds on it. It knows no HTTP.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, NamedTuple, Self

import msgspec
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from actors.types import Usage
from app.schemas.bad_input import shown, wrong

ModelName = Annotated[str, Field(min_length=1, max_length=256)]
SCHEMA_MAX_BYTES = 64 * 1024
JSON_MAX_DEPTH = 32


class Unsupported(NamedTuple):
    """A field of OpenAI's that would change the answer and that Shoal does not implement."""

    reason: str
    neutral: tuple[Any, ...] = ()  # values that ask for nothing; null always does


class WireModel(BaseModel):
    """A JSON object of the API. Unknown keys are refused by name: ignoring one would be a silent wrong answer.

    Null means absent, as the SDKs send it. `ignored` names keys that clients send and that ask for nothing.
    """

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    ignored: ClassVar[frozenset[str]] = frozenset()
    unsupported: ClassVar[Mapping[str, Unsupported]] = {}

    @model_validator(mode="after")
    def _refuse_unknown(self) -> Self:
        for key, value in (self.model_extra or {}).items():
            if value is None or key in self.ignored:
                continue
            refused = self.unsupported.get(key)
            if refused is None:
                raise wrong(f"unknown field '{shown(key)}'; allowed: {self.allowed()}", f".{shown(key)}")
            if value not in refused.neutral:
                raise wrong(f"'{key}' is not supported: {refused.reason}", f".{key}")
        return self

    @classmethod
    def allowed(cls) -> str:
        """The field names, as a caller writes them."""
        return ", ".join(sorted(field.alias or name for name, field in cls.model_fields.items()))


# --- free JSON ---------------------------------------------------------------------------------------


def bounded_json(value: Any, *, max_depth: int = JSON_MAX_DEPTH, max_bytes: int = SCHEMA_MAX_BYTES) -> Any:
    """Return `value` when it is small and shallow enough to be compiled or walked.

    Raises:
        PydanticCustomError: it is too deep, too large or holds NaN or Infinity.
    """
    size = len(msgspec.json.encode(value))
    if size > max_bytes:
        raise wrong(f"{size} bytes of JSON, at most {max_bytes} allowed")
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > max_depth:
            raise wrong(f"nested deeper than the {max_depth} levels allowed")
        if any(isinstance(item, float) and not math.isfinite(item) for item in level):
            raise wrong("NaN and Infinity are not JSON numbers")
        level = [child for item in level for child in _children(item)]
    return value


def _children(item: Any) -> Iterable[Any]:
    if isinstance(item, dict):
        return item.values()
    return item if isinstance(item, list) else ()


BoundedObject = Annotated[dict[str, Any], BeforeValidator(bounded_json)]


# --- text or token ids -------------------------------------------------------------------------------

Inputs = tuple[str, ...] | tuple[tuple[int, ...], ...]


def text_inputs(value: Any) -> Inputs:
    """OpenAI's four shapes of text: "a", ["a", "b"], [1, 2], [[1, 2], [3]].

    Raises:
        PydanticCustomError: another shape, or an empty text or list.
    """
    items = value if isinstance(value, list) and value and not _is_token(value[0]) else [value]
    texts = tuple(
        item if isinstance(item, str) else _token_ids(item, index) for index, item in enumerate(items)
    )
    if "" in texts:
        raise wrong("an empty string is not allowed", f"[{texts.index('')}]" if len(items) > 1 else "")
    if len({type(text) for text in texts}) > 1:
        raise wrong("strings and token ids cannot be mixed")
    return texts  # type: ignore[return-value]  # all of one type: checked above


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _token_ids(value: Any, index: int) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or not all(_is_token(item) and item >= 0 for item in value):
        raise wrong(
            "must be a non-empty string, a list of them, a list of token ids or a list of such lists",
            f"[{index}]" if index else "",
        )
    return tuple(value)


# --- what comes back -------------------------------------------------------------------------------


def new_id(prefix: str) -> str:
    """A fresh id like `chatcmpl-5f0c…`."""
    return f"{prefix}-{uuid.uuid4().hex}"


def usage_object(usage: Usage) -> dict[str, Any]:
    """OpenAI's `usage`."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
