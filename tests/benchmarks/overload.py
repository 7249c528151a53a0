"""Overload: what is still answered in time when two, three, five times as much comes as can be answered.

    python -m tests.benchmarks.overload [--quick] [--json FILE]

An open loop of callers on the pool of `paced_pool`, in HAProxy mode: 15 % interactive (wanted within 2 s), 35 %
standard (4 s), 50 % batch (8 s), by their keys; each says so with the request, and leaves then. Goodput is what is
answered within that time, in tokens, over what the pool can produce. `back_to_normal_s` is from the end of the load
to the first probe from which on all are answered as fast as before it.

The baselines have the same slots and service times, under the same callers, in the same cluster: Serve's router
without a bound, and with `max_queued_requests`. Serve knows no classes.

`retry_after_success`: at 2x, every refused caller comes once more, when it was told to; the share that is answered
then. Its baseline is the same load of callers who come again after 2 s.
"""

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from tests.benchmarks.open_loop import Answer, Arrival, lateness_s, run
from tests.benchmarks.paced_pool import (
    CAPACITY_RPS,
    LEAST_TOKENS,
    MOST_TOKENS,
    SLOTS,
    STEP_S,
    TOKENS_PER_S,
    config,
    key,
)
from tests.benchmarks.plain_serve import application
from tests.benchmarks.report import Row, parser, publish
from tests.benchmarks.saturation import HAPROXY
from tests.benchmarks.traces import lengths, percentile, steady
from tests.conftest import System, running_system

SHARES = {"interactive": 0.15, "standard": 0.35, "batch": 0.5}
WITHIN_S = {"interactive": 2.0, "standard": 4.0, "batch": 8.0}
PROBES_PER_S = 5
NORMAL = 1.5  # times a probe's time before the load
CONSTANT_RETRY_S = 2.0
UNBOUNDED, BOUNDED = "serve", "serve_bounded"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long to look."""

    factors: tuple[int, ...]
    load_s: float
    probes_s: float  # behind a load; what is slow for longer shows as this
    serve: tuple[str, ...]  # baselines
    serve_s: float
    retry_s: float | None  # None: not looked at, it takes a while to show
    before_s: float = 2.0  # probes before a load
    warm_up_s: float = 2.0  # not counted: the slots fill


QUICK = Plan(
    factors=(3,), load_s=5.0, probes_s=2.0, serve=(BOUNDED,), serve_s=3.0, retry_s=None, before_s=1.0
)
FULL = Plan(
    factors=(2, 3, 5), load_s=60.0, probes_s=12.0, serve=(UNBOUNDED, BOUNDED), serve_s=9.0, retry_s=12.0
)


class Callers:
    """Who calls, and how.

    Args:
        headers: of each class; none for a Serve application.
        path: of that application.
    """

    def __init__(self, headers: dict[str, dict[str, str]], path: str | None = None) -> None:
        self._headers = headers
        self._path = path

    def at(
        self, at_s: float, tokens: int, priority: str, label: str, retry_s: float | None = None
    ) -> Arrival:
        """One of them."""
        common = {"at_s": at_s, "tokens": tokens, "label": label, "timeout_s": WITHIN_S[priority]}
        if self._path is not None:
            return Arrival(**common, path=self._path, service_s=tokens * STEP_S)
        return Arrival(**common, headers=self._headers[priority], retry_s=retry_s)

    def load(self, factor: float, seconds: float, retry_s: float | None = None) -> list[Arrival]:
        """`factor` times what can be answered."""
        rng = random.Random(factor)
        found = []
        for priority, share in SHARES.items():
            count = round(factor * share * CAPACITY_RPS * seconds)
            sizes = lengths(count, LEAST_TOKENS, MOST_TOKENS, rng)
            times = steady(count, seconds, rng)
            found += [
                self.at(at_s, tokens, priority, priority, retry_s)
                for at_s, tokens in zip(times, sizes, strict=True)
            ]
        return found

    def probes(self, from_s: float, seconds: float) -> list[Arrival]:
        """Few, of all classes in turn, all the same."""
        names = list(SHARES)
        count = round(seconds * PROBES_PER_S)
        return [
            self.at(from_s + number / PROBES_PER_S, LEAST_TOKENS, names[number % 3], "probe")
            for number in range(count)
        ]


@dataclass(frozen=True, kw_only=True)
class Found:
    """One load."""

    goodput: float  # of capacity
    in_time: dict[str, float]  # of each class, share of all who came
    refused_p99_s: float
    back_to_normal_s: float
    late_s: float


def measure(url: str, callers: Callers, factor: int, load_s: float, plan: Plan) -> Found:
    """One load, with probes behind it."""
    _, before = run(url, callers.probes(0.0, plan.before_s))
    usual_s = statistics.median(one.took_s for one in before)
    begin, answers = run(url, callers.load(factor, load_s) + callers.probes(load_s, plan.probes_s))
    load = [one for one in answers if one.label != "probe"]
    counted = [one for one in load if begin + plan.warm_up_s <= one.ended_at <= begin + load_s]
    good = sum(one.tokens for one in counted if in_time(one))
    return Found(
        goodput=good / (TOKENS_PER_S * (load_s - plan.warm_up_s)),
        in_time={name: share([in_time(one) for one in load if one.label == name]) for name in SHARES},
        refused_p99_s=percentile([one.took_s for one in load if one.refused], 0.99),
        back_to_normal_s=back_to_normal_s(
            [one for one in answers if one.label == "probe"], begin + load_s, usual_s
        ),
        late_s=lateness_s(answers),
    )


def in_time(one: Answer) -> bool:
    """Answered within the time of its class."""
    return one.ok and one.took_s <= WITHIN_S[one.label]


def back_to_normal_s(probes: Sequence[Answer], load_ended_at: float, usual_s: float) -> float:
    """From the end of the load to the first probe from which on all are as fast as before."""
    slow = [one.sent_at for one in probes if not one.ok or one.took_s > NORMAL * usual_s]
    return max(slow) + 1 / PROBES_PER_S - load_ended_at if slow else 0.0


def retried(url: str, callers: Callers, seconds: float, retry_s: float) -> float:
    """Share of those refused at 2x whose first retry is answered."""
    _, answers = run(url, callers.load(2, seconds, retry_s))
    return share([one.ok for one in answers if one.attempt == 2])


def share(yes: Sequence[bool]) -> float:
    """Of all; 1 of nobody."""
    return sum(yes) / len(yes) if yes else 1.0


def measure_all(system: System, plan: Plan) -> list[Row]:
    ours = Callers({name: key(system, "everybody", name) for name in SHARES})
    found = []
    if plan.retry_s is not None:
        # First those who obey: the queue learns from who comes whether its promises are worth keeping.
        obey, constant = [retried(system.http, ours, plan.retry_s, how) for how in (0.0, CONSTANT_RETRY_S)]
        found.append(
            Row(name="retry_after_success", value=obey, unit="of those who retry", baseline="constant 2 s",
                baseline_value=constant)
        )  # fmt: skip
    late_s = 0.0
    for factor in plan.factors:
        one = measure(system.http, ours, factor, plan.load_s, plan)
        beside = {
            name: measure(system.http, Callers({}, f"/{name}"), factor, plan.serve_s, plan)
            for name in plan.serve
        }
        found += rows(factor, one, beside.get(UNBOUNDED), beside.get(BOUNDED))
        late_s = max([late_s, one.late_s, *(other.late_s for other in beside.values())])
    found.append(Row(name="load_generator_late_p99_s", value=late_s, unit="s"))
    return found


def rows(factor: int, one: Found, unbounded: Found | None, bounded: Found | None) -> list[Row]:
    def row(name: str, unit: str, value: float, beside: str, other: float | None) -> Row:
        baseline = None if other is None else beside
        return Row(name=f"{name}_{factor}x", value=value, unit=unit, baseline=baseline, baseline_value=other)

    best, plain = "Serve, max_queued_requests", "Serve, no bound"
    return [
        row("goodput_fraction", "of capacity", one.goodput, best, bounded and bounded.goodput),
        row("goodput_rps", "1/s", one.goodput * CAPACITY_RPS, plain, unbounded and unbounded.goodput * CAPACITY_RPS),
        *(
            row(f"{name}_in_slo", "of all who came", value, best, bounded and bounded.in_time[name])
            for name, value in one.in_time.items()
        ),
        row("refused_p99_s", "s", one.refused_p99_s, best, bounded and bounded.refused_p99_s),
        row("back_to_normal_s", "s", one.back_to_normal_s, plain, unbounded and unbounded.back_to_normal_s),
    ]  # fmt: skip


def main() -> None:
    chosen = parser(__doc__.partition("\n")[0]).parse_args()
    beside = (application(UNBOUNDED, SLOTS), application(BOUNDED, SLOTS, max_queued_requests=2 * SLOTS))
    with running_system(config(*beside), **HAPROXY) as system:
        found = measure_all(system, QUICK if chosen.quick else FULL)
    publish(f"Open-loop overload on {CAPACITY_RPS:g} answers/s, HAProxy mode", found, chosen.json)
    print("Every answer was compared with what its caller must get.")


if __name__ == "__main__":
    main()
