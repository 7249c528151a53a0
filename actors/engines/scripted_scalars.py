"""Numbers and strings to try for a JSON schema, the most natural first.

Called by `scripted_schema`, which takes the first that validates.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from rstr import Rstr

_T = TypeVar("_T")

# format: (what it looks like in a text, what to say when the text has none)
_FORMATS: Mapping[str, tuple[str, str]] = {
    "date": (r"\d{4}-\d\d-\d\d", "2026-01-01"),
    "date-time": (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?(?:Z|[+-]\d\d:\d\d)", "2026-01-01T12:00:00Z"),
    "time": (r"\d\d:\d\d:\d\d(?:Z|[+-]\d\d:\d\d)", "12:00:00Z"),
    "duration": (r"\bP(?:\d+[YMWD])*(?:T(?:\d+[HMS])+)?\b", "PT1H"),
    "email": (r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+", "someone@example.com"),
    "hostname": (r"\b[a-z][\w-]*(?:\.[a-z][\w-]*)+\b", "example.com"),
    "ipv4": (r"\b\d{1,3}(?:\.\d{1,3}){3}\b", "192.0.2.1"),
    "ipv6": (r"[0-9a-fA-F]{1,4}(?::[0-9a-fA-F]{0,4}){2,7}", "2001:db8::1"),
    "uri": (r"\bhttps?://[^\s<>\"]+", "https://example.com/"),
    "uuid": (
        r"\b[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\b",
        "00000000-0000-4000-8000-000000000000",
    ),
}
_MAX_CHARS = 100_000  # a larger minLength is not tried
_PADDING = " and so on"
_MAX_REPEATS = 64  # of the shortest repetition in a pattern, to reach a minLength


def number_candidates(schema: Mapping[str, Any]) -> Iterator[float]:
    """Numbers around the bounds of `schema`; integers come as int."""
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    step = schema.get("multipleOf", 1)
    start = low if low is not None else min(0, high) if high is not None else 1
    yield from (1, 0)
    for number in (1, 0, 2):
        yield _whole((math.ceil(start / step) + number) * step)
    if high is not None:
        for number in (0, -1):
            yield _whole((math.floor(high / step) + number) * step)
        yield (start + high) / 2
    yield start
    yield start + 0.5


def string_candidates(schema: Mapping[str, Any], text: str) -> Iterator[str]:
    """Strings for `schema`: out of `text` where its format or length allows, else made up."""
    if schema.get("format") in _FORMATS:
        looks, default = _FORMATS[schema["format"]]
        yield from re.findall(looks, text)
        yield default
        return
    low, high = min(schema.get("minLength", 0), _MAX_CHARS), schema.get("maxLength")
    plain = text or "text"
    yield (plain + _PADDING * math.ceil(max(0, low - len(plain)) / len(_PADDING)))[:high]
    if "pattern" in schema:
        inside = schema["pattern"].removeprefix("^").removesuffix("$")
        yield from (found.group() for found in re.finditer(inside, text))
        yield from _matches(schema["pattern"], low)


def _matches(pattern: str, at_least: int) -> Iterator[str]:
    """Short matches of a regular expression, growing up to some `at_least` characters."""
    for more in range(min(at_least, _MAX_REPEATS) + 1):
        try:
            yield Rstr(_Least(more)).xeger(pattern)
        except (KeyError, ValueError, IndexError):  # a construct that rstr does not know
            return


def _whole(number: float) -> float:
    return int(number) if float(number).is_integer() else round(number, 10)  # 3 * 0.1 is 0.3


class _Least(random.Random):
    """No chance at all: the smallest choice, and `more` repetitions than needed."""

    def __init__(self, more: int) -> None:
        super().__init__(0)
        self._more = more

    def randint(self, a: int, b: int) -> int:
        """The fewest repetitions, and `more`."""
        return min(a + self._more, max(a, b))

    def choice(self, seq: Sequence[_T]) -> _T:  # type: ignore[override]
        """The first letter or digit by code point, else the first character; of branches the first."""
        if all(isinstance(item, str) for item in seq):  # rstr draws them from a set, whose order is chance
            return min(seq, key=lambda item: (not str(item).isalnum(), str(item)))
        return seq[0]
