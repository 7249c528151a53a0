"""Backfill: batch takes what interactive leaves, and interactive does not notice.

    python -m tests.benchmarks.backfill [--quick] [--json FILE]

On the pool of `paced_pool`, in HAProxy mode. Interactive callers come at random, with 40 % of the capacity; the same
trace runs alone and beside a batch backlog that never ends (closed loop, more callers than slots), in turn.
`batch_share_of_spare` is the tokens that batch readers get over what the pool can produce and interactive readers did
not get, in the same window. All answers are streams, so every token is counted when it comes.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.benchmarks.open_loop import Answer, Arrival, WrongAnswer, lateness_s, run
from tests.benchmarks.paced_pool import (
    CAPACITY_RPS,
    LEAST_TOKENS,
    MOST_TOKENS,
    SLOTS,
    TOKENS_PER_S,
    config,
    key,
)
from tests.benchmarks.report import Row, parser, publish
from tests.benchmarks.saturation import HAPROXY
from tests.benchmarks.traces import lengths, percentile, steady
from tests.conftest import System, running_system

INTERACTIVE, BATCH = "interactive", "batch"
SHARE = 0.4  # of the capacity that interactive takes
BATCH_CALLERS = 3 * SLOTS // 2
BATCH_TOKENS = 100  # longer than any interactive answer
WARM_UP_S = 2.0  # not counted: the slots fill

Headers = dict[str, dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long to look."""

    trace_s: float
    rounds: int


QUICK = Plan(trace_s=8.0, rounds=1)
FULL = Plan(trace_s=30.0, rounds=5)


@dataclass(kw_only=True)
class Found:
    """All rounds together."""

    alone_s: list[float] = field(default_factory=list)  # interactive times to the first token
    beside_s: list[float] = field(default_factory=list)
    batch_tokens: int = 0
    spare_tokens: float = 0.0
    late_s: float = 0.0


def interactive(headers: Headers, seconds: float, seed: int) -> list[Arrival]:
    """The callers that must not notice."""
    rng = random.Random(seed)
    count = round(SHARE * CAPACITY_RPS * seconds)
    sizes = lengths(count, LEAST_TOKENS, MOST_TOKENS, rng)
    return [
        Arrival(at_s=at_s, tokens=tokens, label=INTERACTIVE, headers=headers[INTERACTIVE], stream=True)
        for at_s, tokens in zip(steady(count, seconds, rng), sizes, strict=True)
    ]


def batch(headers: Headers, seconds: float) -> list[Arrival]:
    """The backlog: each caller asks again with each answer."""
    return [
        Arrival(
            at_s=number / BATCH_CALLERS,  # within the first second
            tokens=BATCH_TOKENS,
            label=BATCH,
            headers=headers[BATCH],
            stream=True,
            again_until_s=seconds,
        )
        for number in range(BATCH_CALLERS)
    ]


def answered(url: str, arrivals: Sequence[Arrival]) -> tuple[float, list[Answer]]:
    begin, answers = run(url, arrivals)
    for one in answers:
        if not one.ok:
            raise WrongAnswer(f"{one.label}: {one.outcome}: {one.detail}")
    return begin, answers


def tokens_between(answers: Sequence[Answer], label: str, begin: float, end: float) -> int:
    """Tokens that came in a window."""
    return sum(begin <= at <= end for one in answers if one.label == label for at in one.token_times)


def ttfts(answers: Sequence[Answer], begin: float) -> list[float]:
    """Times to the first token of interactive callers, once the slots are full."""
    return [one.ttft_s for one in answers if one.label == INTERACTIVE and one.due_at >= begin + WARM_UP_S]


def measure(system: System, plan: Plan) -> Found:
    headers = {name: key(system, name, name) for name in (INTERACTIVE, BATCH)}
    run(system.http, interactive(headers, 1.0, 99))  # connections, code paths
    found = Found()
    for seed in range(plan.rounds):
        trace = interactive(headers, plan.trace_s, seed)
        loads = [trace, trace + batch(headers, plan.trace_s)]
        for load in loads if seed % 2 == 0 else reversed(loads):
            begin, answers = answered(system.http, load)
            found.late_s = max(found.late_s, lateness_s(answers))
            if load is trace:
                found.alone_s += ttfts(answers, begin)
                continue
            found.beside_s += ttfts(answers, begin)
            window = (begin + WARM_UP_S, begin + plan.trace_s)
            found.batch_tokens += tokens_between(answers, BATCH, *window)
            produced = TOKENS_PER_S * (plan.trace_s - WARM_UP_S)
            found.spare_tokens += produced - tokens_between(answers, INTERACTIVE, *window)
    return found


def rows(found: Found) -> list[Row]:
    out = [
        Row(name="batch_share_of_spare", value=found.batch_tokens / found.spare_tokens, unit="of spare",
            baseline="no batch", baseline_value=0.0)
    ]  # fmt: skip
    for share, name in ((0.99, "p99"), (0.5, "p50")):
        alone_s, beside_s = percentile(found.alone_s, share), percentile(found.beside_s, share)
        out += [
            Row(name=f"interactive_{name}_ttft_over_without_batch", value=beside_s / alone_s, unit="ratio",
                baseline="no batch", baseline_value=1.0),
            Row(name=f"interactive_{name}_ttft_s", value=beside_s, unit="s", baseline="no batch",
                baseline_value=alone_s),
        ]  # fmt: skip
    out.append(Row(name="load_generator_late_p99_s", value=found.late_s, unit="s"))
    return out


def main() -> None:
    chosen = parser(__doc__.partition("\n")[0]).parse_args()
    with running_system(config(), **HAPROXY) as system:
        found = measure(system, QUICK if chosen.quick else FULL)
    title = f"Batch behind interactive on {CAPACITY_RPS:g} answers/s, HAProxy mode"
    publish(title, rows(found), chosen.json)
    print("Every answer was compared with what its caller must get.")


if __name__ == "__main__":
    main()
