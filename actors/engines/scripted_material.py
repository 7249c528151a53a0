"""What a user's text offers to fill fields with: its numbers, names and quoted words, each used once.

Made by `scripted_text` and `scripted_tools` per answer, drawn from by `scripted_schema`, in the order of the
text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TypeVar

_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?")
_QUOTED = re.compile(r"\"([^\"\n]{1,200})\"|“([^”\n]{1,200})”|`([^`\n]{1,200})`")
_NAME = re.compile(r"(?<!^)(?<![.!?\n]\s)\b[A-Z][\w'-]+(?:\s[A-Z][\w'-]+)*")  # capitals inside a sentence

_T = TypeVar("_T")
Fits = Callable[[object], bool]


class Material:
    """The usable parts of one text.

    Args:
        text: what the user wrote.
        without: words that are never values, such as the names of tools.
    """

    def __init__(self, text: str, without: Iterable[str] = ()) -> None:
        for word in without:
            text = re.sub(rf"(?<![\w-]){re.escape(word)}(?![\w-])", " ", text)
        self.text = text.strip()
        self._numbers = [_number(found) for found in _NUMBER.findall(text)]
        quoted = ["".join(groups) for groups in _QUOTED.findall(text)]
        names: list[str] = _NAME.findall(_QUOTED.sub(" ", text))
        self._strings = quoted + names

    def number(self, fits: Fits) -> float | None:
        """Take the first number that fits."""
        return _take(self._numbers, fits)

    def string(self, fits: Fits) -> str | None:
        """Take the first quoted text or name that fits."""
        return _take(self._strings, fits)

    def mentions(self, value: object) -> bool:
        """Whether the text names `value` as a word."""
        word = re.escape(str(value))
        return re.search(rf"(?<!\w){word}(?!\w)", self.text, re.IGNORECASE) is not None


def _number(found: str) -> float:
    return float(found) if "." in found else int(found)


def _take(values: list[_T], fits: Fits) -> _T | None:
    for at, value in enumerate(values):
        if fits(value):
            return values.pop(at)
    return None
