"""Autoscaling: what our law costs beside a clairvoyant oracle, a proved bound and other people's laws.

    python -m tests.benchmarks.autoscaling [--quick] [--json FILE] [--data DIR] [--seeds N] [--plots DIR]

All in the simulator (`app.simulate`), each policy on the same seeds. DIR holds `servegen/m-small`,
`servegen/deepseek-r1` and `azure2023`; what is absent is skipped with its reason, llm-d's episode needs no data.
- `oracle_gap_60s`, `oracle_gap_5s`: our replica-seconds over the oracle's (99 % of the requests), the worst of both
  ServeGen sets at 1x and 4x time compression, an hour each, by start-up time. The attainment that goes with it is
  in `attainment_60s`, `attainment_5s`: also the worst.
- Baselines: the gap of each law in the position of its knob that is cheapest among those that keep 99 %, chosen
  afterwards, mean of the four; on fewer seeds. Ours as it comes.
- `azure_code_*`: mean replicas at 99 % on Azure's code trace, 40 times its load, from each family's curve.
- `llmd_episode_*`: llm-d's episode; its baseline is llm-d's own law in the same run.
"""

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from app.simulate.case import Options, episode_options
from app.simulate.compare import Compared, Ground, cheapest, compare, draw, prepare
from app.simulate.run import Bounds
from app.simulate.table import Line
from app.simulate.tables import Model
from app.simulate.trace import Lengths
from app.simulate.trace_files import Sampling
from tests.benchmarks.report import Row, parser, publish
from tests.conftest import ROOT

ATTAINMENT = 0.99
BASELINES = ("static", "ray", "ray-tuned", "knative", "llm-d")
SETS = {
    "servegen/m-small": Lengths(prompt_mean=3000.0, output_mean=800.0),
    "servegen/deepseek-r1": Lengths(prompt_mean=1000.0, output_mean=2000.0),
}
AZURE = "azure2023/AzureLLMInferenceTrace_code.csv"
MODEL = Model(max_sequences=32)
MEAN_DEMAND, MOST = 11.0, 32
WARM_UP_S = 600.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is run."""

    seeds: int
    baseline_seeds: int
    episode_seeds: int
    duration_s: float
    sets: tuple[str, ...]
    compressions: tuple[float, ...]
    start_ups_s: tuple[float, ...] = (60.0, 5.0)
    azure: bool = True


FULL = Plan(
    seeds=20, baseline_seeds=2, episode_seeds=20, duration_s=3600.0, sets=tuple(SETS), compressions=(1.0, 4.0)
)
QUICK = Plan(
    seeds=2, baseline_seeds=0, episode_seeds=3, duration_s=1800.0, sets=("servegen/deepseek-r1",),
    compressions=(4.0,), azure=False,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Found:
    """One ServeGen set at one compression and start-up time."""

    case: str
    start_up_s: float
    ours: Line
    baselines: dict[str, Line | None]  # the cheapest position that keeps the attainment


def servegen(data: Path, plan: Plan) -> Iterator[Found]:
    """All cases of the ServeGen sets that are there."""
    for name in plan.sets:
        if not (data / name).is_dir():
            print(f"skipped {name}: {data / name} is absent")
            continue
        for compression in plan.compressions:
            for start_up_s in plan.start_ups_s:
                yield _one(data, name, compression, start_up_s, plan)


def _one(data: Path, name: str, compression: float, start_up_s: float, plan: Plan) -> Found:
    options = Options(
        source=str(data / name),
        model=MODEL._replace(start_up_s=start_up_s),
        bounds=Bounds(max_replicas=MOST, warm_up_s=WARM_UP_S),
        sampling=Sampling(compression=compression, duration_s=plan.duration_s, lengths=SETS[name]),
        mean_demand=MEAN_DEMAND,
    )
    ground = prepare(options, range(plan.seeds), ATTAINMENT)
    ours = compare(ground, "shoal", curve=False).line
    baselines: dict[str, Line | None] = {}
    if plan.baseline_seeds:
        for family in BASELINES:
            found = compare(ground, family, curve=True, cases=plan.baseline_seeds)
            baselines[family] = cheapest(found.curve, ATTAINMENT)
    case = f"{name.rpartition('/')[2]} {compression:g}x"
    print(f"{case}, {start_up_s:g} s: {ours}", flush=True)
    return Found(case=case, start_up_s=start_up_s, ours=ours, baselines=baselines)


def gap_rows(found: Sequence[Found], start_up_s: float) -> list[Row]:
    """Rows of one start-up time."""
    here = [one for one in found if one.start_up_s == start_up_s]
    if not here:
        return []
    tag = f"{start_up_s:g}s"
    rows = [
        Row(name=f"oracle_gap_{tag}", value=max(one.ours.gap_oracle for one in here), unit="x"),
        Row(name=f"attainment_{tag}", value=min(one.ours.attainment for one in here), unit=""),
        Row(name=f"bound_gap_{tag}", value=max(one.ours.gap_bound for one in here), unit="x"),
        Row(name=f"reversals_per_h_{tag}", value=max(one.ours.reversals_per_h for one in here), unit="1/h"),
    ]
    for one in here:
        rows += [
            Row(name=f"oracle_gap_{tag} {one.case}", value=one.ours.gap_oracle, unit="x"),
            Row(name=f"attainment_{tag} {one.case}", value=one.ours.attainment, unit=""),
            Row(name=f"reversals_per_h_{tag} {one.case}", value=one.ours.reversals_per_h, unit="1/h"),
        ]
    ours = statistics.fmean(one.ours.gap_oracle for one in here)
    for family in here[0].baselines:
        lines = [one.baselines[family] for one in here]
        if all(lines):
            gap = statistics.fmean(line.gap_oracle for line in lines if line is not None)
            rows.append(
                Row(name=f"mean_oracle_gap_{tag}", value=ours, unit="x", baseline=family, baseline_value=gap)
            )
        else:
            print(f"{family} keeps {ATTAINMENT:.0%} in no position of its knob at {tag}: no row")
    return rows


def azure_rows(data: Path, plan: Plan, plots: Path | None) -> list[Row]:
    """Azure's code trace: the cheapest position of each family that keeps the attainment."""
    if not plan.azure:
        return []
    if not (data / AZURE).is_file():
        print(f"skipped Azure code: {data / AZURE} is absent")
        return []
    options = Options(
        source=str(data / AZURE), model=MODEL._replace(start_up_s=60.0), bounds=Bounds(max_replicas=64),
        mean_demand=MEAN_DEMAND,
    )  # fmt: skip
    ground = prepare(options, range(3), ATTAINMENT)
    found = {name: compare(ground, name, curve=True) for name in ("shoal", *BASELINES)}
    if plots is not None:
        _draw(ground, found, plots, "azure-code")
    rows = []
    for name, one in found.items():
        for line in one.curve:
            print(f"azure code, {name}: {line.attainment:.4f} at {line.mean_replicas:.2f} replicas")
    ours = cheapest(found["shoal"].curve, ATTAINMENT)
    for name in BASELINES:
        theirs = cheapest(found[name].curve, ATTAINMENT)
        if ours is not None and theirs is not None:
            rows.append(
                Row(name="azure_code_replicas_at_99", value=ours.mean_replicas, unit="", baseline=name,
                    baseline_value=theirs.mean_replicas)
            )  # fmt: skip
    return rows


def episode_rows(plan: Plan, plots: Path | None) -> list[Row]:
    """llm-d's episode."""
    ground = prepare(episode_options(), range(plan.episode_seeds), ATTAINMENT)
    found = {name: compare(ground, name, curve=False) for name in ("shoal", "llm-d")}
    if plots is not None:
        _draw(ground, found, plots, "llmd-episode")
    ours, theirs = found["shoal"].line, found["llm-d"].line
    law = "llm-d's law"
    return [
        Row(name="llmd_episode_attainment", value=ours.attainment, unit="", baseline=law,
            baseline_value=theirs.attainment),
        Row(name="llmd_episode_replicas", value=ours.mean_target, unit="", baseline=law,
            baseline_value=theirs.mean_target),
        Row(name="llmd_episode_reversals_per_h", value=ours.reversals_per_h, unit="1/h", baseline=law,
            baseline_value=theirs.reversals_per_h),
        Row(name="llmd_law_attainment", value=theirs.attainment, unit="", baseline="published",
            baseline_value=0.958),
        Row(name="llmd_law_replicas", value=theirs.mean_target, unit="", baseline="published",
            baseline_value=5.93),
    ]  # fmt: skip


def _draw(ground: Ground, found: dict[str, Compared], plots: Path, name: str) -> None:
    folder = plots / name
    folder.mkdir(parents=True, exist_ok=True)
    examples = [ground.oracles[0], *(one.example for one in found.values())]
    draw(ground, examples, {family: one.curve for family, one in found.items()}, folder)


def main() -> None:
    options = parser(__doc__.partition("\n")[0])
    options.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "traces")
    options.add_argument("--seeds", type=int, help="runs per case instead of the plan's")
    options.add_argument("--plots", type=Path, metavar="DIR", help="also draw plots (needs matplotlib)")
    chosen = options.parse_args()
    plan = _plan(chosen)
    rows = episode_rows(plan, chosen.plots)
    publish("llm-d's episode", rows, None)
    found = list(servegen(chosen.data, plan))
    for start_up_s in plan.start_ups_s:
        rows += gap_rows(found, start_up_s)
    rows += azure_rows(chosen.data, plan, chosen.plots)
    publish("Autoscaling in the simulator", rows, chosen.json)


def _plan(chosen: argparse.Namespace) -> Plan:
    from dataclasses import replace

    plan = QUICK if chosen.quick else FULL
    return replace(plan, seeds=chosen.seeds) if chosen.seeds else plan


if __name__ == "__main__":
    main()
