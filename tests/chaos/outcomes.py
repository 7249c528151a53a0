"""What became of callers: six classes, and the figures that rows of the fault table name.

The answers are known in advance (the scripted engine repeats what it was told), so every caller checks every token.
"""

import enum
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any


class Outcome(enum.StrEnum):
    """How one call ended."""

    OK = "ok"  # every token, once
    SHED = "shed"  # refused at once, with Retry-After
    CLEAN_ERROR = "clean_error"  # an error object or one error event; what came before it is right
    SILENT_TRUNC = "silent_trunc"  # a stream that ended well, without [DONE] and without an error
    DUP_OR_GAP = "dup_or_gap"  # a token twice, missing or wrong, or counted wrong
    CONN_ERROR = "conn_error"  # the connection broke, or the answer is nobody's error object


NEVER = (Outcome.SILENT_TRUNC, Outcome.DUP_OR_GAP)  # 0 in every row


@dataclass(slots=True)
class Call:
    """One caller; times are of the event loop's clock."""

    number: int
    started_at: float
    ended_at: float = 0.0
    outcome: Outcome | None = None
    detail: str = ""  # what went wrong, for people
    status: int = 0
    tokens: int = 0  # events with text that have come
    first_at: float | None = None
    last_at: float | None = None
    longest_gap_s: float = 0.0  # between two tokens
    gap_began_at: float = 0.0
    label: str = ""

    @property
    def took_s(self) -> float:
        """From the connection to the last byte."""
        return self.ended_at - self.started_at

    def arrived(self, now: float) -> None:
        """A token has come."""
        if self.last_at is None:
            self.first_at = now
        elif now - self.last_at > self.longest_gap_s:
            self.longest_gap_s, self.gap_began_at = now - self.last_at, self.last_at
        self.last_at = now
        self.tokens += 1


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A measured value and its bound: the row's, and the one that also holds on a machine full of other work."""

    name: str
    value: float
    unit: str = "s"
    most: float | None = None  # the row's bound
    least: float | None = None
    ci_most: float | None = None  # None: the row's own
    ci_least: float | None = None

    def holds(self, *, ci: bool = False) -> bool:
        most = self.ci_most if ci and self.ci_most is not None else self.most
        least = self.ci_least if ci and self.ci_least is not None else self.least
        return (most is None or self.value <= most) and (least is None or self.value >= least)

    def __str__(self) -> str:
        bound = f" ≤ {self.most:g}" if self.most is not None else ""
        bound += f" ≥ {self.least:g}" if self.least is not None else ""
        return f"{self.name} {self.value:.3g}{f' {self.unit}' if self.unit else ''}{bound}"


@dataclass(kw_only=True)
class Result:
    """One run of one row."""

    row: str  # "4 haproxy"
    fault: str
    expected: str
    calls: list[Call] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    allowed: frozenset[Outcome] = frozenset({Outcome.OK})  # what else than ok the row lets happen
    problems: list[str] = field(default_factory=list)  # what did not hold and is no figure

    @property
    def classes(self) -> Counter[str]:
        return classes(self.calls)

    def broken(self, *, ci: bool = False) -> list[str]:
        """What did not hold; empty when the row did."""
        found = [str(figure) for figure in self.figures if not figure.holds(ci=ci)]
        found += [
            f"#{call.number} {call.label} {call.outcome}: {call.detail}"
            for call in self.calls
            if call.outcome not in self.allowed or call.outcome in NEVER
        ]
        return self.problems + found

    def to_json(self) -> dict[str, Any]:
        return {
            "row": self.row,
            "fault": self.fault,
            "expected": self.expected,
            "callers": dict(self.classes),
            "figures": {figure.name: round(figure.value, 4) for figure in self.figures},
            "held": not self.broken(),
            "broken": self.broken()[:20],
        }


def classes(calls: Iterable[Call]) -> Counter[str]:
    """Callers by class."""
    return Counter(str(call.outcome) for call in calls)


def p99(values: Sequence[float]) -> float:
    """The 99th percentile; 0 of nothing, the largest of few."""
    if len(values) < 100:
        return max(values, default=0.0)
    return statistics.quantiles(values, n=100)[98]
