"""Streams whose replica is killed: how many complete, and how long their readers wait.

    python -m tests.benchmarks.resume [--quick] [--json FILE]

40 and 400 streams at once, 25 tokens a second each, over two replicas, in HAProxy mode; one replica is killed
(kill -9) in the middle. Every token is numbered: one that is lost, doubled or out of place ends the benchmark.
`resume_detection_s` is from the kill to the gateway's last note of a broken answer; `resume_longest_gap_s` from there
to the last first token that comes from elsewhere; `resume_longest_pause_s` is the longest time between two tokens of
any stream, as its reader sees it. Worst of all rounds; the names without a number are the worst of both sizes.

The baselines, under the same streams: Dynamo's frontend with `--migration-limit 3` and two mocker workers, one of
which is killed (its text is nobody's to know, so tokens are counted); and a Serve application that streams over a
handle, one of whose two replicas is killed. `--quick`: 40 streams, one round, no Dynamo.
"""

import itertools
import os
import signal
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.benchmarks import peers
from tests.benchmarks.engine_servers import ServerDied
from tests.benchmarks.environments import NotInstalled
from tests.benchmarks.open_loop import Answer, Arrival, started
from tests.benchmarks.report import Row, parser, publish
from tests.benchmarks.saturation import HAPROXY
from tests.benchmarks.serve_peers import application
from tests.benchmarks.session_log import times_of
from tests.chaos.faults import pids, replicas
from tests.chaos.wire import CHAT
from tests.conftest import System, app_of, config_of, running_system

STEP_S = 0.04
SLOTS = 512  # of each replica: one of them can take over all
SERVE = "serve_handle"
# Prompts that take next to no time, as here, and about as many tokens a second.
DYNAMO_SPEEDUP, DYNAMO_DECODE = 100.0, "--decode-speedup-ratio=0.002"
DYNAMO_ROOM = (f"--max-num-seqs={SLOTS}", "--num-gpu-blocks-override=65536")
# In HAProxy mode Serve keeps what replicas log in memory, a thousand lines of it.
LOGS = {"RAY_SERVE_LOG_TO_STDERR": "1"}
_START_S = 90.0
_SETTLE_S = 2.0  # a new one is known to the queue before the gateways' routers


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is killed."""

    sizes: tuple[int, ...]
    rounds: int
    before_s: float  # from the first stream to the kill
    after_s: float  # from there to the end of the streams, had nothing happened

    @property
    def tokens(self) -> int:  # of each stream
        return round((self.before_s + self.after_s) / STEP_S)


QUICK = Plan(sizes=(40,), rounds=1, before_s=2.0, after_s=3.0)
FULL = Plan(sizes=(40, 400), rounds=3, before_s=3.0, after_s=5.0)


@dataclass(frozen=True, kw_only=True)
class Found:
    """One kill."""

    completed: float  # share of streams whose every token came, once
    longest_pause_s: float
    detection_s: float
    gap_s: float  # behind the detection
    moved: int  # streams whose gateway noted that they broke


def judged(answers: Sequence[Answer], killed_at: float, seen_at: Sequence[float] = ()) -> Found:
    """What a kill did to streams.

    Args:
        answers: of all streams.
        killed_at: when.
        seen_at: when broken answers were noted; none: nobody tells.
    """
    detected_at = max(seen_at, default=killed_at)
    pairs = [
        (before, after)
        for one in answers
        for before, after in itertools.pairwise(one.token_times)
        if after >= killed_at
    ]
    return Found(
        completed=sum(one.ok for one in answers) / len(answers),
        longest_pause_s=max((after - before for before, after in pairs), default=0.0),
        detection_s=detected_at - killed_at,
        gap_s=max(
            (after - detected_at for before, after in pairs if before <= detected_at <= after), default=0.0
        ),
        moved=len(seen_at),
    )


def killing(url: str, streams: list[Arrival], plan: Plan, victim: int) -> tuple[float, list[Answer]]:
    """Kill a process in the middle of streams; returns when, and the answers."""
    with started(url, streams) as load:
        time.sleep(max(load.begins_at + plan.before_s - time.monotonic(), 0))
        killed_at = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        return killed_at, load.answers()


def streams(size: int, plan: Plan, **more: Any) -> list[Arrival]:
    """All within half a second."""
    timeout_s = 4 * (plan.before_s + plan.after_s)
    return [
        Arrival(at_s=0.5 * number / size, tokens=plan.tokens, stream=True, timeout_s=timeout_s, **more)
        for number in range(size)
    ]


# --- who is killed -----------------------------------------------------------------------------------


def config() -> dict[str, Any]:
    """The scripted system with two replicas, and Serve's handle streams beside it."""
    base = config_of("scripted", auth={"mode": "open"}, retrieval=None, announce_url=None)
    model = app_of(base, "build_model")
    model["args"]["engine"]["scripted"] = {
        "max_sequences": SLOTS,
        "itl_base_s": STEP_S,
        "itl_per_sequence_s": 0,
        "prefill_tokens_per_s": None,
    }
    model["deployments"] = [{"name": "LLMReplica", "num_replicas": 2}]
    serve = application(SERVE, by_reference=False) | {"deployments": [{"name": "Echo", "num_replicas": 2}]}
    base["applications"] = [model, app_of(base, "build_gateway"), serve]
    return base


def shoal(system: System, size: int, plan: Plan) -> Found:
    _both(system, "scripted", "LLMReplica")
    begun = time.monotonic()
    killed_at, answers = killing(system.http, streams(size, plan), plan, min(pids(system)))
    seen = [at for at in times_of(system, "attempt_failed") if at >= begun]
    assert seen, "the gateway has noted no broken answer"
    return judged(answers, killed_at, seen)


def handle_stream(system: System, size: int, plan: Plan) -> Found:
    _both(system, SERVE, "Echo")
    load = streams(size, plan, counted=True, path=f"/{SERVE}{CHAT}", extra={"step_s": STEP_S})
    killed_at, answers = killing(system.http, load, plan, min(pids(system, SERVE, "Echo")))
    return judged(answers, killed_at)


def dynamo(size: int, plan: Plan) -> Found:
    with peers.dynamo(DYNAMO_SPEEDUP, workers=2, options=(DYNAMO_DECODE, *DYNAMO_ROOM)) as target:
        time.sleep(_SETTLE_S)  # the second one registers
        load = streams(size, plan, counted=True)
        killed_at, answers = killing(target.url, load, plan, target.pids[1])
        return judged(answers, killed_at)


def _both(system: System, app: str, deployment: str) -> None:
    """Until both replicas run and get work."""
    deadline = time.monotonic() + _START_S
    while len(replicas(system, app, deployment)) < 2:
        assert time.monotonic() < deadline, f"no second {deployment} within {_START_S} s"
        time.sleep(0.3)
    time.sleep(_SETTLE_S)


# --- all of it ---------------------------------------------------------------------------------------


class Run:
    """All kills.

    Args:
        plan: how many.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.found: dict[tuple[str, int], list[Found]] = {}
        self.reason: str | None = None  # why Dynamo was not run

    def system(self) -> None:
        with running_system(config(), **HAPROXY, **LOGS) as system:
            for size in self.plan.sizes:
                self.found["shoal", size] = [shoal(system, size, self.plan) for _ in range(self.plan.rounds)]
                self.found[SERVE, size] = [handle_stream(system, size, self.plan)]

    def dynamo(self) -> None:
        try:
            for size in self.plan.sizes:
                self.found["dynamo", size] = [dynamo(size, self.plan) for _ in range(self.plan.rounds)]
        except (NotInstalled, ServerDied) as error:
            self.reason = str(error)

    def rows(self) -> list[Row]:
        everything = [one for size in self.plan.sizes for one in self.found["shoal", size]]
        out = [
            Row(name="resume_longest_gap_s", value=max(one.gap_s for one in everything), unit="s"),
            Row(name="resume_completed_fraction", value=_mean(everything), unit="of streams"),
        ]
        for size in self.plan.sizes:
            ours, theirs = self.found["shoal", size], self.found.get(("dynamo", size))
            beside = None if theirs is None else "Dynamo, --migration-limit 3"
            out += [
                Row(name=f"resume_completed_fraction_{size}", value=_mean(ours), unit="of streams", baseline=beside,
                    baseline_value=theirs and _mean(theirs)),
                Row(name=f"resume_longest_pause_s_{size}", value=_pause_s(ours), unit="s", baseline=beside,
                    baseline_value=theirs and _pause_s(theirs)),
                Row(name=f"resume_longest_gap_s_{size}", value=max(one.gap_s for one in ours), unit="s"),
                Row(name=f"resume_detection_s_{size}", value=max(one.detection_s for one in ours), unit="s"),
                Row(name=f"resume_streams_moved_{size}", value=sum(one.moved for one in ours), unit="streams"),
                Row(name=f"serve_handle_completed_fraction_{size}", value=_mean(self.found[SERVE, size]),
                    unit="of streams"),
            ]  # fmt: skip
        if self.reason is not None:
            out.append(Row(name="dynamo_not_run", value=0.0, unit=f"could not run: {self.reason}"))
        return out


def _mean(found: Sequence[Found]) -> float:
    return statistics.mean(one.completed for one in found)


def _pause_s(found: Sequence[Found]) -> float:
    return max(one.longest_pause_s for one in found)


def main() -> None:
    chosen = parser(__doc__.partition("\n")[0]).parse_args()
    (run := Run(QUICK if chosen.quick else FULL)).system()
    if not chosen.quick:
        run.dynamo()
    publish(
        f"One of two replicas killed, {1 / STEP_S:g} tokens/s per stream, HAProxy mode",
        run.rows(),
        chosen.json,
    )
    print("Every token of Shoal's answers was numbered and checked, those of the baselines were counted.")


if __name__ == "__main__":
    main()
