"""What every benchmark module shares: its options, its rows, its table and its JSON.

A module is run as `python -m tests.benchmarks.NAME [--quick] [--json FILE]`. `--quick` ends within 60 s once
things are installed. A row's baseline was measured in the same run.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure."""

    name: str
    value: float
    unit: str
    baseline: str | None = None  # what it is compared with
    baseline_value: float | None = None

    @property
    def ratio(self) -> float | None:
        """Value over baseline."""
        if self.baseline_value in (None, 0):
            return None
        return self.value / self.baseline_value

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "value": self.value,
            "unit": self.unit,
            "baseline": self.baseline,
            "baseline_value": self.baseline_value,
            "ratio": self.ratio,
        }


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--quick", action="store_true", help="fewer rounds; at most 60 s")
    options.add_argument("--json", type=Path, metavar="FILE", help="also write the rows as JSON")
    return options


def publish(title: str, rows: Sequence[Row], json_file: Path | None) -> None:
    """Print the table, and write the JSON where asked."""
    table = Table(title=title)
    for column in ("name", "value", "unit", "baseline", "baseline value", "ratio"):
        table.add_column(column, justify="left" if column in ("name", "unit", "baseline") else "right")
    for row in rows:
        table.add_row(
            row.name,
            _short(row.value),
            row.unit,
            row.baseline or "",
            _short(row.baseline_value),
            _short(row.ratio),
        )
    Console(width=120).print(table)
    if json_file is not None:
        json_file.write_text(json.dumps([row.to_json() for row in rows], indent=2) + "\n")


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
