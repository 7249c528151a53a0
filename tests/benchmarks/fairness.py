"""Fairness: what a steady tenant feels of one that comes in bursts, and what the fair order costs.

    python -m tests.benchmarks.fairness [--quick] [--json FILE]

On the pool of `paced_pool`, in HAProxy mode. A victim sends a steady 30 % of the capacity as streams; a bursty tenant
sends as much in bursts (coefficient of variation 9), half of all load. `victim_p99_ttft_over_alone` is against the same
victim trace alone, before and after. The baseline, FIFO, is the same trace with both under one tenant: its order is by
deadline, and all deadlines are equally far away. The rows that end in `_at_80` are the same with 40 % each: there the
victim by itself wants more than half of the slots at times, which is more than its share. `--quick` leaves them out.

Then both send more than their share at once, the bursty one a moment earlier and in long answers. While both wait,
the largest difference of their service over any interval is set against the proved bound (`vtc_gap_over_bound`; the
tokens are counted as the readers get them), and the pool's tokens per second against those of the same requests in
FIFO order (`throughput_over_fifo`).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from actors.policies.class_line import INPUT_WEIGHT, OUTPUT_WEIGHT
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
from tests.benchmarks.traces import bursts, largest_gap, lengths, percentile, steady
from tests.conftest import System, running_system

SHARE = 0.3  # of the capacity, of each of the two
HIGH_SHARE = 0.4
CV = 9.0
VICTIM, BURSTY = "victim", "bursty"
LONG, SHORT = MOST_TOKENS, LEAST_TOKENS
LOOK_AHEAD = 1  # sequences that may hold credit beyond the slots: `BatchingQueueConfig.look_ahead`

Headers = dict[str, dict[str, str]]  # of each of the two tenants


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long to look."""

    trace_s: float
    rounds: int  # of the traces, each with its seed
    backlog_s: float  # what the backlog takes
    shares: tuple[float, ...]  # of the capacity, of each of the two


QUICK = Plan(trace_s=4.0, rounds=1, backlog_s=2.0, shares=(SHARE,))
FULL = Plan(trace_s=45.0, rounds=2, backlog_s=15.0, shares=(SHARE, HIGH_SHARE))


def victim(headers: Headers, seconds: float, seed: int, share: float = SHARE) -> list[Arrival]:
    """The steady tenant's trace."""
    rng = random.Random(seed)
    count = round(share * CAPACITY_RPS * seconds)
    return _arrivals(steady(count, seconds, rng), VICTIM, headers[VICTIM], rng, stream=True)


def bursty(headers: Headers, seconds: float, seed: int, share: float = SHARE) -> list[Arrival]:
    """The other one's."""
    rng = random.Random(1000 + seed)
    count = round(share * CAPACITY_RPS * seconds)
    return _arrivals(bursts(count, seconds, CV, rng), BURSTY, headers[BURSTY], rng, stream=False)


def _arrivals(
    times: Sequence[float], label: str, headers: dict[str, str], rng: random.Random, *, stream: bool
) -> list[Arrival]:
    sizes = lengths(len(times), LEAST_TOKENS, MOST_TOKENS, rng)
    return [
        Arrival(at_s=at_s, tokens=tokens, label=label, headers=headers, stream=stream)
        for at_s, tokens in zip(times, sizes, strict=True)
    ]


def all_answered(url: str, arrivals: Sequence[Arrival]) -> list[Answer]:
    """Nobody is refused: the deadlines are far away."""
    _, answers = run(url, arrivals)
    for one in answers:
        if not one.ok:
            raise WrongAnswer(f"{one.label}: {one.outcome}: {one.detail}")
    return answers


# --- a victim beside bursts --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Felt:
    """The victim's times to the first token, over all rounds."""

    alone_s: list[float]
    fair_s: list[float]
    fifo_s: list[float]
    late_s: float  # of the load process, at most

    def over_alone(self, ttft_s: Sequence[float], share: float = 0.99) -> float:
        """A percentile against the same of the victim alone."""
        return percentile(ttft_s, share) / percentile(self.alone_s, share)


def felt(url: str, headers: Headers, plan: Plan, share: float) -> Felt:
    """Alone, beside bursts, beside bursts in FIFO order, alone."""
    found: dict[str, list[float]] = {"alone": [], "fair": [], "fifo": []}
    late_s = 0.0
    one_tenant = {VICTIM: headers[VICTIM], BURSTY: headers[VICTIM]}
    for seed in range(plan.rounds):
        alone = victim(headers, plan.trace_s, seed, share)
        beside = alone + bursty(headers, plan.trace_s, seed, share)
        in_line = alone + bursty(one_tenant, plan.trace_s, seed, share)
        for name, arrivals in (("alone", alone), ("fair", beside), ("fifo", in_line), ("alone", alone)):
            answers = all_answered(url, arrivals)
            found[name] += [one.ttft_s for one in answers if one.label == VICTIM]
            late_s = max(late_s, lateness_s(answers))
    return Felt(alone_s=found["alone"], fair_s=found["fair"], fifo_s=found["fifo"], late_s=late_s)


# --- two that both wait ------------------------------------------------------------------------------


def backlog(headers: Headers, seconds: float) -> list[Arrival]:
    """As many tokens of each tenant, all wanted at once: first all of the one, then all of the other."""
    each = TOKENS_PER_S * seconds / 2
    found = []
    for label, tokens, from_s in ((BURSTY, LONG, 0.0), (VICTIM, SHORT, 0.5)):
        count = round(each / tokens)
        found += [
            Arrival(
                at_s=from_s + 0.5 * number / count,
                tokens=tokens,
                label=label,
                headers=headers[label],
                stream=True,
            )
            for number in range(count)
        ]
    return found


def bound() -> float:
    """Of the difference of service of two tenants of weight 1 that both wait; see `ClassLine`."""
    held = (SLOTS + LOOK_AHEAD) * 2 * MOST_TOKENS  # prompt and output of all that can be granted
    return 2 * max(INPUT_WEIGHT * MOST_TOKENS, OUTPUT_WEIGHT * held)


def gap(answers: Sequence[Answer]) -> float:
    """The largest difference of service over any interval in which both tenants wait.

    Both wait from the last arrival until the last request of one of them has its first token.
    """
    begun = max(one.due_at for one in answers)
    over = min(max(one.token_times[0] for one in answers if one.label == label) for label in (VICTIM, BURSTY))
    served = []
    for one in answers:
        sign = 1.0 if one.label == VICTIM else -1.0
        served.append((one.token_times[0], sign * INPUT_WEIGHT * one.tokens))  # its prompt is as long
        served += [(at, sign * OUTPUT_WEIGHT) for at in one.token_times]
    return largest_gap([(at, service) for at, service in served if begun <= at <= over])


def tokens_per_s(answers: Sequence[Answer]) -> float:
    """From the first request to the last token."""
    took_s = max(one.ended_at for one in answers) - min(one.sent_at for one in answers)
    return sum(one.tokens for one in answers) / took_s


# --- all of it ---------------------------------------------------------------------------------------


def rows_of(traces: Felt, suffix: str) -> list[Row]:
    found = []
    for share, name in ((0.99, "p99"), (0.5, "p50")):
        found += [
            Row(name=f"victim_{name}_ttft_over_alone{suffix}", value=traces.over_alone(traces.fair_s, share),
                unit="ratio", baseline="FIFO", baseline_value=traces.over_alone(traces.fifo_s, share)),
            Row(name=f"victim_{name}_ttft_s{suffix}", value=percentile(traces.fair_s, share), unit="s",
                baseline="alone", baseline_value=percentile(traces.alone_s, share)),
        ]  # fmt: skip
    return [*found, Row(name=f"load_generator_late_p99_s{suffix}", value=traces.late_s, unit="s")]


def measure(system: System, plan: Plan) -> list[Row]:
    headers = {name: key(system, name) for name in (VICTIM, BURSTY)}
    one_tenant = {VICTIM: headers[VICTIM], BURSTY: headers[VICTIM]}
    run(system.http, victim(headers, 1.0, 0))  # connections, code paths
    found = []
    for share in plan.shares:
        traces = felt(system.http, headers, plan, share)
        found += rows_of(traces, "" if share == SHARE else f"_at_{round(200 * share)}")
    fair = all_answered(system.http, backlog(headers, plan.backlog_s))
    fifo = all_answered(system.http, backlog(one_tenant, plan.backlog_s))
    found += [
        Row(name="throughput_over_fifo", value=tokens_per_s(fair) / tokens_per_s(fifo), unit="ratio",
            baseline="FIFO", baseline_value=1.0),
        Row(name="vtc_gap_over_bound", value=gap(fair) / bound(), unit="ratio", baseline="FIFO",
            baseline_value=gap(fifo) / bound()),
        Row(name="fair_tokens_per_s_of_capacity", value=tokens_per_s(fair) / TOKENS_PER_S, unit="of capacity",
            baseline="FIFO", baseline_value=tokens_per_s(fifo) / TOKENS_PER_S),
    ]  # fmt: skip
    return found


def main() -> None:
    chosen = parser(__doc__.partition("\n")[0]).parse_args()
    with running_system(config(), **HAPROXY) as system:
        found = measure(system, QUICK if chosen.quick else FULL)
    publish(f"Two tenants on {CAPACITY_RPS:g} answers/s, HAProxy mode", found, chosen.json)
    print("Every answer was compared with what its caller must get.")


if __name__ == "__main__":
    main()
