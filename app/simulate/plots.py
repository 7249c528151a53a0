"""The plots of `shoal simulate --plots DIR`, as SVG files.

matplotlib comes with the extra `simulate` and is imported here only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.errors import InvalidRequest
from app.simulate.run import Result
from app.simulate.table import Line


def figures() -> Any:
    """The `figure` module of matplotlib, without a display.

    Raises:
        InvalidRequest: matplotlib is not installed; says how to get it.
    """
    try:
        import matplotlib as mpl
        from matplotlib import figure
    except ImportError:
        raise InvalidRequest("--plots needs matplotlib: pip install 'shoal[simulate]'") from None
    mpl.rcParams["svg.fonttype"] = "none"
    mpl.rcParams["svg.hashsalt"] = "shoal"
    return figure


def replicas_over_time(path: Path, demand: Any, grid_s: float, results: Sequence[Result], title: str) -> None:
    """Replicas of each policy against the demand.

    Args:
        path: of the SVG file.
        demand: full replicas needed, on a grid.
        grid_s: of the grid.
        results: one per policy, of the same seed.
        title: of the plot.
    """
    drawn = figures().Figure(figsize=(9, 4), layout="constrained")
    axes = drawn.subplots()
    every = max(len(demand) // 400, 1)
    shown = demand[: len(demand) // every * every].reshape(-1, every).mean(axis=1)
    hours = [at * every * grid_s / 3600.0 for at in range(len(shown))]
    axes.fill_between(hours, shown, color="0.85", label="demand (full replicas)")
    for result in results:
        thin = max(len(result.series) // 400, 1)
        axes.step(
            result.series[::thin, 0] / 3600.0,
            result.series[::thin, 3],
            where="post",
            lw=1.0,
            label=result.policy,
        )
    axes.set(xlabel="hours", ylabel="replicas", title=title)
    axes.legend(fontsize="small", ncols=3)
    _save(drawn, path)


def attainment_against_cost(path: Path, curves: Mapping[str, Sequence[Line]], title: str) -> None:
    """A curve per family of policies, a point per setting.

    Args:
        path: of the SVG file.
        curves: lines of each family.
        title: of the plot.
    """
    drawn = figures().Figure(figsize=(6, 4), layout="constrained")
    axes = drawn.subplots()
    for family, lines in curves.items():
        points = sorted((line.mean_replicas, line.attainment * 100.0) for line in lines)
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", ms=3, lw=1.0, label=family)
    axes.axhline(99.0, color="0.6", lw=0.8, ls=":")
    axes.set(xlabel="mean replicas", ylabel="requests within both SLOs, %", title=title)
    axes.legend(fontsize="small")
    _save(drawn, path)


def _save(drawn: Any, path: Path) -> None:
    drawn.savefig(path, format="svg", metadata={"Date": None})
