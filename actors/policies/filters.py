"""OpenAI's attribute filters: parsed once, so that a bad one is refused, then asked of every file.

Pure. `actors.retriever` applies them to the attributes that the catalog holds, after the search: pushed down
to Chroma a filter is a full scan (stores.md).

    {"type": "and", "filters": [{"type": "eq", "key": "lang", "value": "en"},
                                {"type": "gte", "key": "year", "value": 2024}]}
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

from actors.errors import InvalidRequest

Attributes = Mapping[str, Any]
Predicate = Callable[[Attributes], bool]

_MAX_DEPTH = 8
_MAX_FILTERS = 100  # inside one compound filter
_MAX_VALUES = 1000  # of in and nin
_ORDER: dict[str, Callable[[Any, Any], bool]] = {
    "gt": operator.gt, "gte": operator.ge, "lt": operator.lt, "lte": operator.le,
}  # fmt: skip
_COMPARISONS = ("eq", "ne", *_ORDER, "in", "nin")
_COMPOUNDS = ("and", "or")
_MISSING = object()


def parse_filter(raw: Mapping[str, Any] | None) -> Predicate:
    """What says whether a file with given attributes passes.

    A file without the attribute passes `ne` and `nin` only. Values of another type than the attribute's are
    unequal and unordered to it; strings are ordered by code point, which is right for ISO dates.

    Args:
        raw: a comparison or compound filter; None passes everything.

    Raises:
        InvalidRequest: the filter is malformed; `param` is the path to what is wrong.
    """
    if raw is None:
        return lambda _: True
    return _parse(raw, "filters", 0)


def _parse(raw: Any, path: str, depth: int) -> Predicate:
    if not isinstance(raw, Mapping):
        raise InvalidRequest(f"{path} must be an object with a type, got {_name(raw)}", path)
    if depth >= _MAX_DEPTH:
        raise InvalidRequest(f"filters may be nested at most {_MAX_DEPTH} deep", path)
    kind = raw.get("type")
    if kind in _COMPOUNDS:
        return _compound(raw, path, depth)
    if kind in _COMPARISONS:
        return _comparison(raw, path)
    allowed = ", ".join((*_COMPARISONS, *_COMPOUNDS))
    raise InvalidRequest(f"{path}.type must be one of {allowed}; got {kind!r:.80}", f"{path}.type")


def _compound(raw: Mapping[str, Any], path: str, depth: int) -> Predicate:
    _check_keys(raw, path, ("type", "filters"))
    inner = raw.get("filters")
    if not isinstance(inner, list | tuple) or not 1 <= len(inner) <= _MAX_FILTERS:
        raise InvalidRequest(
            f"{path}.filters must be a list of 1 to {_MAX_FILTERS} filters", f"{path}.filters"
        )
    parts = [_parse(one, f"{path}.filters[{index}]", depth + 1) for index, one in enumerate(inner)]
    combine = all if raw["type"] == "and" else any
    return lambda attributes: combine(part(attributes) for part in parts)


def _comparison(raw: Mapping[str, Any], path: str) -> Predicate:
    _check_keys(raw, path, ("type", "key", "value"))
    key, kind = raw.get("key"), raw["type"]
    if not isinstance(key, str) or not key:
        raise InvalidRequest(f"{path}.key must be the name of an attribute", f"{path}.key")
    if kind in ("in", "nin"):
        return _membership(key, _values(raw.get("value"), f"{path}.value"), inside=kind == "in")
    value = _scalar(raw.get("value"), f"{path}.value")
    if kind in _ORDER:
        return _ordered(key, value, _ORDER[kind])
    return _membership(key, [value], inside=kind == "eq")


def _membership(key: str, values: list[Any], *, inside: bool) -> Predicate:
    wanted = {(_kind(value), value) for value in values}

    def passes(attributes: Attributes) -> bool:
        value = attributes.get(key, _MISSING)
        return (value is not _MISSING and (_kind(value), value) in wanted) == inside

    return passes


def _ordered(key: str, value: Any, compare: Callable[[Any, Any], bool]) -> Predicate:
    kind = _kind(value)

    def passes(attributes: Attributes) -> bool:
        found = attributes.get(key, _MISSING)
        return _kind(found) == kind and bool(compare(found, value))

    return passes


def _kind(value: Any) -> str:
    """Type for comparisons: whole and other numbers are one, and `True` is no 1."""
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else _name(value)


def _values(raw: Any, path: str) -> list[Any]:
    if not isinstance(raw, list | tuple) or not 1 <= len(raw) <= _MAX_VALUES:
        raise InvalidRequest(f"{path} must be a list of 1 to {_MAX_VALUES} values", path)
    return [_scalar(value, f"{path}[{index}]") for index, value in enumerate(raw)]


def _scalar(raw: Any, path: str) -> str | float | bool:
    if not isinstance(raw, str | int | float | bool):
        raise InvalidRequest(f"{path} must be a string, a number or a boolean, got {_name(raw)}", path)
    return raw


def _check_keys(raw: Mapping[str, Any], path: str, allowed: tuple[str, ...]) -> None:
    for key in raw:
        if key not in allowed:
            raise InvalidRequest(
                f"{path} has an unknown key {key!r:.80}; allowed: {', '.join(allowed)}", f"{path}.{key}"
            )


def _name(value: Any) -> str:
    return type(value).__name__
