"""Plays seeds of the simulation and prints those that went wrong.

    python -m tests.simulation --seeds 1000 [--first 0] [--size 1] [--verbose]
    python -m tests.simulation --walk kill_queue [--first STEP] [--seeds STEPS] [--verbose]

A seed is one scenario with its faults; `--walk` plays one small scenario with one fault between two steps, at each
step in turn.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator

from tests.simulation.plan import FaultKind, Scenario, scenario, walk_scenario
from tests.simulation.run import Result, play


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--size", type=float, default=1.0)
    parser.add_argument("--walk", type=FaultKind, choices=list(FaultKind))
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    began = time.process_time()
    wrong, steps, played = 0, 0, 0
    outcomes: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    closest, slowest = 0.0, list[tuple[float, int]]()
    for number, plan in _plans(args):
        result = play(plan, verbose=args.verbose)
        played += 1
        steps += result.steps
        outcomes += result.outcomes
        faults.update(result.faults)
        counts += result.counts
        counts["pairs of tenants that waited together"] += result.pairs
        closest = max(closest, result.closest)
        slowest.append((round(result.slowest_s, 1), number))
        if result.wrongs or (args.verbose and args.seeds == 1):
            print(told(result, number, args.walk, args.size))
        wrong += bool(result.wrongs)
    took_s = time.process_time() - began
    print(f"{played} runs, {wrong} wrong, {played / took_s:.1f} runs/s, {steps / took_s / 1000:.0f}k steps/s")
    print(f"outcomes {dict(outcomes)}\nfaults {dict(faults)}\ncounted {dict(counts)}")
    print(f"most of the fairness bound used: {closest:.2f}; slowest, with seed: {sorted(slowest)[-12:]}")
    return 1 if wrong else 0


def told(result: Result, number: int, walk: FaultKind | None = None, size: float = 1.0) -> str:
    """What was wrong in a run, and how to see it again."""
    how = f"--walk {walk}" if walk is not None else f"--size {size:g}"
    lines = [
        *result.trace,
        *(f"WRONG {wrong}" for wrong in result.wrongs),
        f"faults {result.faults} outcomes {dict(result.outcomes)} steps {result.steps}",
        f"again: python -m tests.simulation {how} --first {number} --seeds 1 --verbose",
    ]
    return "\n".join(lines)


def _plans(args: argparse.Namespace) -> Iterator[tuple[int, Scenario]]:
    for number in range(args.first, args.first + args.seeds):
        if args.walk is not None:
            yield number, walk_scenario((number, args.walk))
        else:
            yield number, scenario(number, size=args.size)


if __name__ == "__main__":
    sys.exit(main())
