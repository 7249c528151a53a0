"""The table that `shoal simulate` prints: a row per policy, means over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from rich.table import Table

from app.simulate.run import Result

COLUMNS = (
    "policy", "attainment", "mean replicas", "replica-s", "gap oracle", "gap bound", "lag s", "reversals/h",
    "TTFT mean s", "TTFT p99 s",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Line:
    """A policy over all seeds: means."""

    policy: str
    attainment: float
    mean_replicas: float
    mean_target: float
    replica_s: float
    gap_oracle: float  # replica-seconds over the oracle's
    gap_bound: float  # over the proved lower bound
    scale_lag_s: float
    reversals_per_h: float
    ttft_mean_s: float
    ttft_p99_s: float

    @classmethod
    def of(cls, results: Sequence[Result], oracle_s: Sequence[float], bound_s: Sequence[float]) -> Line:
        """The line of one policy.

        Args:
            results: one per seed.
            oracle_s: the oracle's replica-seconds, per seed.
            bound_s: the bound's.
        """
        spent = fmean(r.replica_s for r in results)
        return cls(
            policy=results[0].policy,
            attainment=fmean(r.attainment for r in results),
            mean_replicas=fmean(r.mean_replicas for r in results),
            mean_target=fmean(r.mean_target for r in results),
            replica_s=spent,
            gap_oracle=spent / fmean(oracle_s),
            gap_bound=spent / fmean(bound_s),
            scale_lag_s=fmean(r.scale_lag_s for r in results),
            reversals_per_h=fmean(r.reversals_per_h for r in results),
            ttft_mean_s=fmean(r.ttft_mean_s for r in results),
            ttft_p99_s=fmean(r.ttft_p99_s for r in results),
        )


def table(title: str, lines: Sequence[Line]) -> Table:
    """All lines."""
    shown = Table(title=title)
    for column in COLUMNS:
        shown.add_column(column, justify="left" if column == "policy" else "right")
    for line in lines:
        shown.add_row(
            line.policy,
            f"{line.attainment:.2%}",
            f"{line.mean_replicas:.2f}",
            f"{line.replica_s:.0f}",
            f"{line.gap_oracle:.3f}",
            f"{line.gap_bound:.3f}",
            f"{line.scale_lag_s:.1f}",
            f"{line.reversals_per_h:.1f}",
            f"{line.ttft_mean_s:.3f}",
            f"{line.ttft_p99_s:.3f}",
        )
    return shown
