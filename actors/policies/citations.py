"""Which passages an answer stands on, and where: pure functions and one small state machine per answer.

A model that was given numbered passages may cite them, in one of many notations, or not at all; small models do
the latter. `MarkerFilter` takes markers out of the text, also while it streams; `attribute` turns them into
citations and falls back on shared words. Called by `app.schemas` for every answer that was given passages.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from actors.types import Passage

# [1]  [1, 2]  [^1]  [source 1]  (source 1)  (see passage 2)  【1】  【1†source】  【4:0†guide.pdf】
_WORDS = ("source", "doc", "document", "passage", "context", "ref", "reference", "citation", "chunk", "see")
_WORD = (
    r"(?:(?:see|sources?|docs?|documents?|passages?|contexts?|refs?|references?|citations?|chunks?)[\s:#.]*)"
)
_NUMBERS = r"#?\d{1,3}(?:\s*(?:,|;|&|and|-)\s*#?\d{1,3})*"
_MARKER = re.compile(
    rf"[ \t]*(?:\[\^?{_WORD}{{0,2}}(?P<square>{_NUMBERS})\]|\({_WORD}{{1,2}}(?P<round>{_NUMBERS})\)"
    r"|【(?P<corner>\d{1,3})[^】\n]{0,80}】)",
    re.IGNORECASE,
)
# The end of the text that may still become a marker: it is held back until the next piece decides.
_OPEN = re.compile(
    r"[ \t]*(?:(?P<corner>【[^】\n`]{0,90})|(?P<opener>[\[(])(?P<inside>[^\[\]()【】\n`]{0,90}))?$"
)
_PARTIAL = re.compile(
    rf"\^?(?P<words>{_WORD}{{0,2}})(?:(?P<letters>[a-z]*)|#?\d[\d\s,;&#-]*(?:an?|and)?\s*#?\d*)",
    re.IGNORECASE,
)
_CODE = re.compile(r"(`+)")

_WORD_PATTERN = re.compile(r"\w{3,}")
_SENTENCE = re.compile(r"[^.!?\n]+(?:[.!?](?!\s|$)[^.!?\n]*)*[.!?\n]*")
_STOP_WORDS = frozenset(
    _WORD_PATTERN.findall(
        "the and for are was were with that this from have has had not but you your can will its their they them "
        "which who what when where how why all any also may one our out about into than then there these those "
        "does did been being would could should only other some such each most more very yes"
    )
)
_SUPPORT = 0.5  # of a sentence's words must stand in the passage


@dataclass(frozen=True, kw_only=True, slots=True)
class Citation:
    """A passage that supports the answer up to `index`, a character offset in the cleaned text."""

    passage: Passage
    index: int


class MarkerFilter:
    """Takes citation markers out of a text that comes in pieces; code is left alone.

    Args:
        passages: how many passages there are: a number outside is no marker, but part of the text.

    Attributes:
        marks: what was taken out: (offset in the cleaned text, number of the passage from 1).
    """

    def __init__(self, passages: int) -> None:
        self.marks: list[tuple[int, int]] = []
        self._passages = passages
        self._held = ""
        self._given = 0  # characters of cleaned text handed out so far
        self._fence = ""  # the backticks that opened the code we are in

    def feed(self, piece: str) -> str:
        """Clean text that is ready; what may be the start of a marker waits for the next piece."""
        text = self._held + piece
        held = self._open_end(text)
        self._held = text[len(text) - held :] if held else ""
        return self._clean(text[: len(text) - held])

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        text, self._held = self._held, ""
        return self._clean(text)

    def _open_end(self, text: str) -> int:
        """Characters at the end of `text` that may belong to a marker or to a run of backticks."""
        backticks = len(text) - len(text.rstrip("`"))
        if backticks:
            return backticks
        found = _OPEN.search(text)
        if found is None or (found["opener"] and not _may_become_marker(found["opener"], found["inside"])):
            return 0
        return len(text) - found.start()

    def _clean(self, text: str) -> str:
        out = []
        for part in _CODE.split(text):
            if part.startswith("`"):
                self._fence = self._next_fence(part)
                out.append(self._give(part))
            else:
                out.append(self._give(part) if self._fence else self._strip(part))
        return "".join(out)

    def _next_fence(self, backticks: str) -> str:
        if not self._fence:
            return backticks
        return "" if backticks == self._fence else self._fence

    def _strip(self, text: str) -> str:
        out, position = [], 0
        for found in _MARKER.finditer(text):
            numbers = _numbers(found["square"] or found["round"] or found["corner"])
            if not all(1 <= number <= self._passages for number in numbers) and not found["corner"]:
                continue  # "a[10]" of five passages: the author's own text
            out.append(self._give(text[position : found.start()]))
            self.marks += [(self._given, number) for number in numbers if 1 <= number <= self._passages]
            position = found.end()
        out.append(self._give(text[position:]))
        return "".join(out)

    def _give(self, text: str) -> str:
        self._given += len(text)
        return text


def _may_become_marker(opener: str, inside: str) -> bool:
    found = _PARTIAL.fullmatch(inside)
    if found is None:
        return False
    if found["letters"]:
        return any(name.startswith(found["letters"].lower()) for name in _WORDS)
    return opener == "[" or not inside or bool(found["words"])


def _numbers(text: str) -> list[int]:
    numbers: list[int] = []
    for part in re.split(r"[,;&]|and", text):
        ends = [int(end) for end in re.findall(r"\d+", part)]
        numbers += range(ends[0], min(ends[-1], ends[0] + 20) + 1)
    return numbers


def attribute(
    text: str, passages: Sequence[Passage], marks: Sequence[tuple[int, int]]
) -> tuple[Citation, ...]:
    """The citations of a whole answer, in its order.

    The model's own marks count first. Without any, a sentence is attributed to the passage that shares most of
    its words; when no sentence is, the best passage stands for the whole answer.

    Args:
        text: the cleaned answer.
        passages: what the model was given, in the order of its numbers, best first.
        marks: what `MarkerFilter` found.
    """
    if not text.strip() or not passages:
        return ()
    if marks:
        return tuple(
            Citation(passage=passages[number - 1], index=index) for index, number in dict.fromkeys(marks)
        )
    return _by_shared_words(text, passages) or (Citation(passage=passages[0], index=len(text)),)


def _by_shared_words(text: str, passages: Sequence[Passage]) -> tuple[Citation, ...]:
    vocabularies = [_words(passage.text) for passage in passages]
    runs: list[tuple[int, int]] = []  # (passage, end of the run of sentences that it supports)
    for sentence in _SENTENCE.finditer(text):
        best = _best(_words(sentence.group()), vocabularies)
        if best is None:
            continue
        end = sentence.start() + len(sentence.group().rstrip())
        if runs and runs[-1][0] == best:
            runs.pop()
        runs.append((best, end))
    return tuple(Citation(passage=passages[passage], index=end) for passage, end in runs)


def _best(words: frozenset[str], vocabularies: Sequence[frozenset[str]]) -> int | None:
    """The passage with most of the words; the higher ranked one on a tie, None below the support needed."""
    if not words:
        return None
    shared = [len(words & vocabulary) for vocabulary in vocabularies]
    best = max(range(len(shared)), key=lambda passage: (shared[passage], -passage))
    return best if shared[best] >= _SUPPORT * len(words) else None


def _words(text: str) -> frozenset[str]:
    return frozenset(_WORD_PATTERN.findall(text.lower())) - _STOP_WORDS
