"""The simulator against the running system: the same trace slice through both.

    python -m tests.benchmarks.simulator [--quick] [--json FILE] [--data DIR]

Serve runs the scripted engine with a time-stretched curve (steps of 120 ms and more, so that the overhead of calls
does not drown it), 1 to 4 replicas under `app.scaling:QueuePolicy`. The simulator gets the same arrivals, lengths,
curve and policy settings, and two things that were measured on the system: how long a replica took to start, and
what an idle system adds to a first token. Differences are simulator over Serve.

The slice is of the ServeGen trace deepseek-r1 below DIR (default ../shared/data/traces); where that is absent, of a
synthetic load, and the benchmark says so.
"""

import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from actors.policies.autoscaling import ScalingConfig
from app.simulate.policies import Shoal
from app.simulate.run import Bounds, Result, simulate
from app.simulate.tables import Model
from app.simulate.trace import Trace
from app.simulate.trace_files import Sampling, read
from tests.benchmarks.open_loop import Answer, Arrival, lateness_s, run
from tests.benchmarks.report import Row, parser, publish
from tests.conftest import ROOT, System, app_of, config_of, running_system

MODEL = Model(
    itl_base_s=0.12, itl_per_sequence_s=0.004, prefill_tokens_per_s=400.0, max_sequences=8, look_ahead=1,
    start_up_s=8.0, ttft_slo_s=2.0, tpot_slo_s=0.25, timeout_s=120.0,
)  # fmt: skip
LEAST_TOKENS, MOST_TOKENS, OVERHEAD_TOKENS = 12, 36, 4
SCALING = {"smoothing_s": 3.0, "hold_s": 30.0, "slack_s": 1.5}
MOST = 4
MEAN_DEMAND = 2.0  # replicas
COMPRESSION = 60.0
_POLL_S = 0.25
_TRACE = "servegen/deepseek-r1"


def trace(folder: Path | None, seconds: float, seed: int = 3) -> Trace:
    """A slice of so many seconds, at the demand of `MEAN_DEMAND` replicas; each answer repeats its prompt."""
    rng = np.random.default_rng(seed)
    mean = (LEAST_TOKENS + MOST_TOKENS) / 2
    rps = MEAN_DEMAND / _work_s(mean)
    if folder is None:
        minutes = np.arange(0.0, seconds, 20.0)
        rates = rps * (1.0 + 0.6 * np.sin(2.0 * np.pi * minutes / seconds * 1.5))
        arrive = np.concatenate(
            [
                np.sort(m + rng.uniform(0, 20.0, rng.poisson(r * 20.0)))
                for m, r in zip(minutes, rates, strict=True)
            ]
        )
    else:
        whole = read(str(folder), Sampling(seed=seed, compression=COMPRESSION, duration_s=seconds, times=1.0))
        times = rps * seconds / len(whole)
        arrive = read(
            str(folder), Sampling(seed=seed, compression=COMPRESSION, duration_s=seconds, times=times)
        ).arrive_s
    output = rng.integers(LEAST_TOKENS, MOST_TOKENS + 1, len(arrive))
    return Trace(
        name="slice", arrive_s=arrive, prompt_tokens=output + OVERHEAD_TOKENS, output_tokens=output,
        tenant=np.zeros(len(arrive), np.int64), duration_s=seconds,
    )  # fmt: skip


def _work_s(tokens: float) -> float:
    step_s = MODEL.itl_base_s / MODEL.max_sequences + MODEL.itl_per_sequence_s
    return (tokens + OVERHEAD_TOKENS) / MODEL.prefill_tokens_per_s + tokens * step_s


def config() -> dict[str, Any]:
    """One elastic model and a gateway."""
    base = config_of("scripted", auth={"mode": "open"}, retrieval=None, announce_url=None)
    model = app_of(base, "build_model")
    quick = {"metrics_interval_s": 0.2, "look_back_period_s": 1}
    model["autoscaling_policy"] = {
        "policy_function": "app.scaling:QueuePolicy",
        "policy_kwargs": {"LLMReplica": SCALING},
    }
    model["args"]["queue"] = {"ttft_slo_s": MODEL.ttft_slo_s, "tpot_slo_s": MODEL.tpot_slo_s}
    model["args"]["engine"]["scripted"] = {
        "max_sequences": MODEL.max_sequences,
        "itl_base_s": MODEL.itl_base_s,
        "itl_per_sequence_s": MODEL.itl_per_sequence_s,
        "prefill_tokens_per_s": MODEL.prefill_tokens_per_s,
        "start_up_s": MODEL.start_up_s,
    }
    model["deployments"] = [
        {"name": "BatchingQueue", "autoscaling_config": {"min_replicas": 1, "max_replicas": 1, **quick}},
        {
            "name": "LLMReplica",
            "graceful_shutdown_wait_loop_s": 0.1,
            "autoscaling_config": {
                "min_replicas": 1, "max_replicas": MOST, "upscale_delay_s": 0, "downscale_delay_s": 0, **quick,
            },
        },
    ]  # fmt: skip
    base["applications"] = [model, app_of(base, "build_gateway")]
    return base


@dataclass
class Watched:
    """What Serve's REST API showed while it was asked."""

    seen: list[tuple[float, dict[str, str]]]  # when, replica id → state

    def replica_s(self, begin: float, end: float) -> float:
        """Replica-seconds: starting, running and stopping ones."""
        total = 0.0
        for (at, states), (until, _) in zip(self.seen, self.seen[1:], strict=False):
            total += max(min(until, end) - max(at, begin), 0.0) * len(states)
        return total

    def start_up_s(self) -> float | None:
        """Mean time from the first sight of a replica to its running."""
        first: dict[str, float] = {}
        took: dict[str, float] = {}
        for at, states in self.seen[1:]:
            for replica, state in states.items():
                if replica in self.seen[0][1]:
                    continue
                first.setdefault(replica, at)
                if state == "RUNNING" and replica not in took:
                    took[replica] = at - first[replica]
        return statistics.fmean(took.values()) if took else None


@contextmanager
def watching(system: System) -> Iterator[Watched]:
    """Look at the replicas every quarter of a second."""
    watched, done = Watched([]), threading.Event()

    def look() -> None:
        while not done.is_set():
            found = system.status()["scripted"]["deployments"]["LLMReplica"]["replicas"]
            watched.seen.append((time.monotonic(), {r["replica_id"]: r["state"] for r in found}))
            done.wait(_POLL_S)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield watched
    finally:
        done.set()
        thread.join()


def idle_overhead_s(system: System, count: int) -> float:
    """What a first token takes beyond the curve when nothing else runs."""
    tokens = 2
    _, answers = run(system.http, [Arrival(at_s=1.2 * n, tokens=tokens, stream=True) for n in range(count)])
    model_s = (
        MODEL.itl_base_s + MODEL.itl_per_sequence_s + (tokens + OVERHEAD_TOKENS) / MODEL.prefill_tokens_per_s
    )
    return max(statistics.median(a.ttft_s for a in answers) - model_s, 0.0)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The system's side."""

    attainment: float
    ttft_mean_s: float
    ttft_p99_s: float
    replica_s: float
    late_s: float  # of the load process, p99


def measured(answers: Sequence[Answer], replica_s: float) -> Measured:
    """What the callers saw."""
    ttft = np.array([a.token_times[0] - a.due_at if a.ok else np.inf for a in answers])
    tpot = np.array(
        [(a.token_times[-1] - a.token_times[0]) / max(a.tokens - 1, 1) if a.ok else np.inf for a in answers]
    )
    within = (ttft <= MODEL.ttft_slo_s) & (tpot <= MODEL.tpot_slo_s)
    answered = ttft[np.isfinite(ttft)]
    return Measured(
        attainment=float(within.mean()),
        ttft_mean_s=float(answered.mean()),
        ttft_p99_s=float(np.quantile(answered, 0.99)),
        replica_s=replica_s,
        late_s=lateness_s(answers),
    )


def simulated(slice_: Trace, start_up_s: float, overhead_s: float) -> Result:
    """The simulator's side: the overhead of a call lies half before the engine and half behind it."""
    model = MODEL._replace(
        start_up_s=start_up_s, call_s=overhead_s / 2.0, ttft_slo_s=MODEL.ttft_slo_s - overhead_s / 2.0
    )
    policy = Shoal(ScalingConfig(min_replicas=1, max_replicas=MOST, **SCALING), 1)
    policy.every_s = 0.2
    result = simulate(slice_, model, policy, Bounds(max_replicas=MOST, first_replicas=1))
    return replace(
        result,
        ttft_mean_s=result.ttft_mean_s + overhead_s / 2.0,
        ttft_p99_s=result.ttft_p99_s + overhead_s / 2.0,
    )


def rows(real: Measured, model: Result, start_up_s: float, overhead_s: float) -> list[Row]:
    """Differences, and both sides."""
    serve = "Serve"
    return [
        Row(name="attainment_difference", value=100.0 * (model.attainment - real.attainment), unit="pp"),
        Row(name="ttft_mean_difference", value=100.0 * (model.ttft_mean_s / real.ttft_mean_s - 1.0), unit="%"),
        Row(name="ttft_p99_difference", value=100.0 * (model.ttft_p99_s / real.ttft_p99_s - 1.0), unit="%"),
        Row(name="replica_seconds_difference", value=100.0 * (model.replica_s / real.replica_s - 1.0), unit="%"),
        Row(name="attainment", value=model.attainment, unit="", baseline=serve, baseline_value=real.attainment),
        Row(name="ttft_mean_s", value=model.ttft_mean_s, unit="s", baseline=serve, baseline_value=real.ttft_mean_s),
        Row(name="ttft_p99_s", value=model.ttft_p99_s, unit="s", baseline=serve, baseline_value=real.ttft_p99_s),
        Row(name="replica_seconds", value=model.replica_s, unit="s", baseline=serve, baseline_value=real.replica_s),
        Row(name="start_up_s", value=start_up_s, unit="s"),
        Row(name="idle_overhead_s", value=overhead_s, unit="s"),
        Row(name="load_lateness_p99_s", value=real.late_s, unit="s"),
    ]  # fmt: skip


def main() -> None:
    options = parser(__doc__.partition("\n")[0])
    options.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "traces")
    chosen = options.parse_args()
    folder: Path | None = chosen.data / _TRACE
    if not folder.is_dir():
        print(f"{folder} is absent: a synthetic load instead")
        folder = None
    seconds = 20.0 if chosen.quick else 300.0
    slice_ = trace(folder, seconds)
    with running_system(config()) as system:
        overhead_s = idle_overhead_s(system, 3 if chosen.quick else 10)
        arrivals = [
            Arrival(at_s=float(at), tokens=int(tokens), stream=True)
            for at, tokens in zip(slice_.arrive_s, slice_.output_tokens, strict=True)
        ]
        with watching(system) as watched:
            begin, answers = run(system.http, arrivals)
    replica_s = watched.replica_s(begin, begin + seconds)
    start_up_s = watched.start_up_s() or MODEL.start_up_s
    real = measured(answers, replica_s)
    model = simulated(slice_, start_up_s, overhead_s)
    title = f"Simulator and Serve, {len(answers)} requests in {seconds:.0f} s"
    publish(title, rows(real, model, start_up_s, overhead_s), chosen.json)


if __name__ == "__main__":
    main()
