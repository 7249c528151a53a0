"""Callers who come when they come, whatever has become of the earlier ones: a process of its own.

`callers` is that process; `run` starts it, and `started` where something happens meanwhile. Used by `overload`,
`fairness`, `backfill` and `resume`. Times are `time.monotonic`, which all processes of a machine share.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from tests.benchmarks.traces import percentile
from tests.chaos.outcomes import Outcome
from tests.chaos.wire import CHAT
from tests.conftest import ROOT

REFUSED = frozenset({429, 503})  # statuses of who was turned away


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """One caller."""

    at_s: float  # after the beginning
    tokens: int  # of the answer
    label: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    stream: bool = False
    timeout_s: float = 300.0  # the caller wants the answer within this time, says so, and leaves then
    retry_s: float | None = None  # once refused: comes again after this time; 0: when it was told to
    again_until_s: float | None = None  # asks the next question with each answer, until then
    service_s: float | None = None  # for a plain Serve deployment: how long to hold a slot
    path: str = CHAT
    counted: bool = False  # a stream whose text nobody knows: its tokens are counted
    extra: dict[str, Any] = field(default_factory=dict)  # of the body of such a one


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What became of one request; times are absolute."""

    label: str
    tokens: int  # that were asked for
    due_at: float  # when it should have been sent
    sent_at: float
    ended_at: float
    outcome: str
    status: int
    detail: str
    attempt: int
    token_times: list[float]  # of streams

    @property
    def ok(self) -> bool:
        """Every token, once."""
        return self.outcome == Outcome.OK

    @property
    def refused(self) -> bool:
        """Turned away before anything was done."""
        return self.status in REFUSED

    @property
    def took_s(self) -> float:
        """From the connection to the last byte."""
        return self.ended_at - self.sent_at

    @property
    def ttft_s(self) -> float:
        """From the connection to the first token."""
        return self.token_times[0] - self.sent_at


class WrongAnswer(Exception):
    """A caller got what no caller may get: a token that is lost, doubled or somebody else's."""


class Load:
    """A load process under way."""

    def __init__(self, process: subprocess.Popen, begins_at: float) -> None:
        self._process = process
        self.begins_at = begins_at

    def answers(self) -> list[Answer]:
        """All answers, once the last caller has left.

        Raises:
            WrongAnswer: a fault of the system under test, or a load process that could not keep up.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise WrongAnswer("the load process ended without a result")
        found = [Answer(**one) for one in json.loads(line)]
        for one in found:
            if one.outcome in {Outcome.DUP_OR_GAP, Outcome.SILENT_TRUNC}:
                raise WrongAnswer(f"{one.label}: {one.outcome}: {one.detail}")
        return found


@contextmanager
def started(url: str, arrivals: Sequence[Arrival]) -> Iterator[Load]:
    """Begin a load; it ends with the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.callers", url],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps([asdict(arrival) for arrival in arrivals]) + "\n")
        process.stdin.flush()
        yield Load(process, begins_at=float(process.stdout.readline()))
    finally:
        process.kill()
        process.communicate()


def run(url: str, arrivals: Sequence[Arrival]) -> tuple[float, list[Answer]]:
    """Put a load on a system; returns when it began, and all answers."""
    with started(url, arrivals) as load:
        return load.begins_at, load.answers()


def lateness_s(answers: Sequence[Answer]) -> float:
    """How late the load process was with one request in a hundred: what it measures is off by that."""
    return percentile([one.sent_at - one.due_at for one in answers], 0.99)
