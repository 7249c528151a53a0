"""Policies beside each other on the same cases: lines of a table, curves, plots."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from app.simulate.case import Case, Options, case
from app.simulate.choices import Setting, family
from app.simulate.oracle import demand, lower_bound_s, oracle
from app.simulate.plots import attainment_against_cost, replicas_over_time
from app.simulate.run import Result, simulate
from app.simulate.table import Line

_GRID_S = 30.0  # of the demand that plots show


@dataclass(frozen=True, kw_only=True, eq=False)
class Ground:
    """Cases, and what bounds any policy on them."""

    cases: list[Case]
    attainment: float
    oracles: list[Result]
    bounds_s: list[float]

    def line(self, results: Sequence[Result]) -> Line:
        """The line of a policy that ran on the first cases."""
        n = len(results)
        return Line.of(results, [o.replica_s for o in self.oracles[:n]], self.bounds_s[:n])


@dataclass(frozen=True, kw_only=True, eq=False)
class Compared:
    """A family on all cases."""

    line: Line  # as it comes; of static pools, the least that keeps the attainment
    example: Result  # on the first case
    curve: list[Line]


def prepare(options: Options, seeds: Iterable[int], attainment: float = 0.99) -> Ground:
    """Make the cases and bound them.

    Args:
        options: of the cases.
        seeds: one case each.
        attainment: that the oracle keeps and the bound assumes.
    """
    cases = [case(options, seed) for seed in seeds]
    oracles = [oracle(c.trace, c.model, c.bounds, attainment=attainment) for c in cases]
    bounds_s = [
        lower_bound_s(
            c.trace, c.model, attainment=attainment, begin_s=c.bounds.warm_up_s, end_s=c.trace.duration_s
        )
        for c in cases
    ]
    return Ground(cases=cases, attainment=attainment, oracles=oracles, bounds_s=bounds_s)


def oracle_line(ground: Ground) -> Line:
    """The oracle's own line."""
    return ground.line(ground.oracles)


def run(ground: Ground, setting: Setting, cases: int | None = None) -> list[Result]:
    """One setting on the first so many cases."""
    return [
        simulate(c.trace, c.model, setting.make(c), c.bounds)
        for c in ground.cases[: cases or len(ground.cases)]
    ]


def compare(ground: Ground, name: str, *, curve: bool, cases: int | None = None) -> Compared:
    """A family: its first setting, and where a curve is asked for all of them.

    Args:
        ground: the cases.
        name: of the family.
        curve: turn the knob, too.
        cases: of the first so many cases; None: all.
    """
    settings = family(name)
    if name == "static":
        return _static(ground, settings[: ground.cases[0].bounds.max_replicas], cases)
    results = [run(ground, setting, cases) for setting in (settings if curve else settings[:1])]
    lines = [ground.line(of_seeds) for of_seeds in results]
    return Compared(line=lines[0], example=results[0][0], curve=lines)


def _static(ground: Ground, settings: Sequence[Setting], cases: int | None) -> Compared:
    """Static pools: the least one that keeps the attainment, and its neighbours below."""
    low, high = 0, len(settings) - 1
    known: dict[int, list[Result]] = {}
    while low < high:
        middle = (low + high) // 2
        known[middle] = run(ground, settings[middle], cases)
        if ground.line(known[middle]).attainment >= ground.attainment:
            high = middle
        else:
            low = middle + 1
    known[low] = known.get(low) or run(ground, settings[low], cases)
    curve = [ground.line(known[n]) for n in sorted(known)]
    return Compared(line=ground.line(known[low]), example=known[low][0], curve=curve)


def cheapest(lines: Sequence[Line], attainment: float) -> Line | None:
    """The least replicas among the lines that keep an attainment; None: none does."""
    return min((x for x in lines if x.attainment >= attainment), key=lambda x: x.replica_s, default=None)


def draw(
    ground: Ground, examples: Sequence[Result], curves: Mapping[str, Sequence[Line]], folder: Path
) -> list[Path]:
    """Both plots of a comparison; returns their files."""
    first = ground.cases[0]
    over_time, against_cost = folder / "replicas.svg", folder / "attainment.svg"
    needed = demand(first.trace, first.model, _GRID_S)
    replicas_over_time(over_time, needed, _GRID_S, examples, f"{first.trace.name}: replicas over time")
    attainment_against_cost(against_cost, curves, f"{first.trace.name}: attainment against cost")
    return [over_time, against_cost]
