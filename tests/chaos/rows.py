"""The rows of the fault table that run here, and the two sizes in which they run.

A row is a function from a system and a size to a `Result`. Tests call it small, `tests.chaos.report` in full.
"""

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from tests.chaos.outcomes import Call, Figure, Outcome, Result, p99
from tests.chaos.systems import Chaos


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large a row is run."""

    before_s: float  # from the start of the load to the fault
    after_s: float  # of load behind the fault, at least
    kills: int  # of row 2
    streams: int  # of row 2, at least
    overload: tuple[float, ...]  # of row 17, in capacities
    overload_s: float  # each
    stopped_s: float  # of row 26


CI = Size(before_s=3, after_s=4, kills=2, streams=60, overload=(3,), overload_s=10, stopped_s=5)
FULL = Size(before_s=20, after_s=40, kills=20, streams=1000, overload=(2, 3, 5), overload_s=60, stopped_s=30)

Run = Callable[[Chaos, Size, Result], Awaitable[None]]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the table."""

    name: str  # "4", "26 engine"
    fault: str
    expected: str
    allowed: frozenset[Outcome]
    mode: str  # of the system that it needs: "default", "haproxy"
    fill: Run

    @property
    def number(self) -> int:
        return int(self.name.split()[0])

    async def run(self, chaos: Chaos, size: Size) -> Result:
        """Break it once. The result says what did not hold, the books and what is left included."""
        result = Result(row=self.name, fault=self.fault, expected=self.expected, allowed=self.allowed)
        async with chaos.fault():
            await self.fill(chaos, size, result)
        return result


ROWS: dict[str, Row] = {}


def row(
    name: str, fault: str, expected: str, *, allowed: Iterable[Outcome] = (), mode: str = "default"
) -> Callable[[Run], Run]:
    """Enter a function into the table. `allowed`: what callers may see beside ok."""

    def enter(fill: Run) -> Run:
        ROWS[name] = Row(
            name=name,
            fault=fault,
            expected=expected,
            allowed=frozenset({Outcome.OK, *allowed}),
            mode=mode,
            fill=fill,
        )
        return fill

    return enter


# --- figures that several rows have ---------------------------------------------------------------------------


def added_p99(calls: list[Call], fault_at: float, *, most: float, ci_most: float) -> Figure:
    """How much longer the slowest calls took that saw the fault, against those that ended before it."""
    before = p99([call.took_s for call in calls if call.ended_at < fault_at])
    after = p99([call.took_s for call in calls if call.ended_at >= fault_at])
    return Figure(name="added p99", value=after - before, most=most, ci_most=ci_most)


def longest_gap(calls: list[Call], *, most: float, ci_most: float) -> Figure:
    """Between two tokens of any stream."""
    value = max((call.longest_gap_s for call in calls), default=0.0)
    return Figure(name="longest gap", value=value, most=most, ci_most=ci_most)


def resumed(calls: list[Call], faults_at: Iterable[float]) -> Figure:
    """Streams whose tokens paused at a fault and came on behind it: without one, nothing was tested."""
    hit = [
        call
        for call in calls
        if any(at - 0.15 <= call.gap_began_at <= at + 1 for at in faults_at) and call.longest_gap_s > 0.1
    ]
    return Figure(name="streams resumed", value=len(hit), unit="", least=1)


def failure_window(calls: list[Call], fault_at: float, *, most: float, ci_most: float) -> Figure:
    """From the fault to the end of the last call that failed."""
    failed = [call.ended_at - fault_at for call in calls if call.outcome is not Outcome.OK]
    return Figure(name="failure window", value=max(failed, default=0.0), most=most, ci_most=ci_most)
