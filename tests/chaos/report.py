"""Runs rows of the fault table in full and prints what became of whom.

    python -m tests.chaos.report [--rows 1,2,16] [--times 3] [--quick] [--haproxy] [--json FILE]

Each row is broken under load in a system that all rows of its mode share; `--haproxy` runs all in HAProxy mode,
`--quick` in the size of the tests. The exit status says whether every row held.
"""

import argparse
import asyncio
import json
import sys
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.chaos import rows_clients, rows_control, rows_replica
from tests.chaos.outcomes import Outcome, Result
from tests.chaos.rows import CI, FULL, ROWS, Row, Size
from tests.chaos.systems import Chaos, chaos

MODULES = (rows_clients, rows_control, rows_replica)  # their rows are in the table once they are imported


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--rows", help="numbers, with commas between them; all without")
    options.add_argument("--times", type=int, default=1, help="runs of each row, one after the other")
    options.add_argument("--quick", action="store_true", help="in the size of the tests")
    options.add_argument("--haproxy", action="store_true", help="all rows in HAProxy mode")
    options.add_argument("--json", type=Path, metavar="FILE", help="also write the results as JSON")
    chosen = options.parse_args()
    wanted = {int(number) for number in chosen.rows.split(",")} if chosen.rows else set()
    rows = [row for row in in_order() if not wanted or row.number in wanted]
    if chosen.haproxy:
        rows = [row for row in rows if row.name != "4"]  # there is no such proxy there
    results: list[Result] = []
    for mode in ("default", "haproxy"):
        here = [row for row in rows if ("haproxy" if chosen.haproxy else row.mode) == mode]
        if here:
            with chaos(mode) as system:
                results += asyncio.run(_run(system, here, CI if chosen.quick else FULL, chosen.times))
    Console(width=180).print(table(results))
    if chosen.json is not None:
        chosen.json.write_text(json.dumps([result.to_json() for result in results], indent=2) + "\n")
    sys.exit(any(result.broken() for result in results))


def in_order() -> list[Row]:
    """All rows by number."""
    return sorted(ROWS.values(), key=lambda row: (row.number, row.name))


async def _run(system: Chaos, rows: Sequence[Row], size: Size, times: int) -> list[Result]:
    results = []
    for _ in range(times):
        for row in rows:
            print(f"row {row.name}: {row.fault} ...", flush=True)
            try:
                result = await row.run(system, size)
            except Exception as error:  # the other rows are still to be run
                traceback.print_exc()
                result = Result(row=row.name, fault=row.fault, expected=row.expected)
                result.problems.append(f"{type(error).__name__}: {error}"[:300])
            print_one(result)
            results.append(result)
    return results


async def held(shared: Chaos, name: str) -> None:
    """Run one row in its CI size; the tests' only assertion."""
    result = await ROWS[name].run(shared, CI)
    print_one(result, ci=True)
    broken = result.broken(ci=True)
    assert not broken, "\n".join(broken)


def print_one(result: Result, *, ci: bool = False) -> None:
    """A run's callers and figures, and what did not hold."""
    print(f"row {result.row}: {dict(result.classes)}; {', '.join(map(str, result.figures))}", flush=True)
    seen = Counter(f"{call.outcome}: {call.detail}"[:160] for call in result.calls if call.detail)
    for detail, count in seen.most_common(4):
        print(f"    {count} x {detail}", flush=True)
    for problem in result.broken(ci=ci)[:5]:
        print(f"    did not hold: {problem}", flush=True)


def table(results: Sequence[Result]) -> Table:
    """One line per run."""
    columns = ("row", "fault", *Outcome, "figures", "expected", "held")
    made = Table(title="Faults on real processes", show_lines=True)
    for column in columns:
        made.add_column(column, justify="right" if column in set(Outcome) else "left")
    for result in results:
        counts = [str(result.classes[outcome]) for outcome in Outcome]
        figures = "\n".join(map(str, result.figures))
        held = "yes" if not result.broken() else "NO"
        made.add_row(result.row, result.fault, *counts, figures, result.expected, held)
    return made


if __name__ == "__main__":
    main()
