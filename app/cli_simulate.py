"""`shoal simulate`: scaling policies on a trace, in a table and in plots. Needs no server and no Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli_output import print_json, say, stdout

_OURS = "shoal"


def simulate(  # noqa: PLR0913  a command has as many options as it has
    *,
    trace: Annotated[
        str, typer.Argument(help="llmd, a CSV file of Azure's format, or a folder of ServeGen's *-trace.csv.")
    ],
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="shoal, static, ray, ray-tuned, knative, llm-d or all; may be given several times."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs, each drawn anew.")] = 1,
    slo_ttft: Annotated[float | None, typer.Option(min=0.001, help="Seconds to the first token.")] = None,
    slo_tpot: Annotated[float | None, typer.Option(min=0.0001, help="Seconds per further token.")] = None,
    attainment: Annotated[
        float, typer.Option(min=0.01, max=0.9999, help="What the oracle must keep.")
    ] = 0.99,
    start_up: Annotated[float | None, typer.Option(min=0, help="Seconds until a replica is ready.")] = None,
    min_replicas: Annotated[int | None, typer.Option(min=1, help="Least replicas.")] = None,
    max_replicas: Annotated[int | None, typer.Option(min=1, help="Most replicas.")] = None,
    compression: Annotated[float, typer.Option(min=0.001, help="Rates change so many times faster.")] = 1.0,
    mean_demand: Annotated[
        float, typer.Option(min=0, help="Scale the load to so many busy replicas; 0: as it is.")
    ] = 11.0,
    duration: Annotated[float, typer.Option(min=60, help="Seconds of the (compressed) trace.")] = 3600.0,
    warm_up: Annotated[float, typer.Option(min=0, help="Seconds before anything counts.")] = 600.0,
    prompt_tokens: Annotated[float, typer.Option(min=1, help="Mean prompt where a trace has none.")] = 2000.0,
    output_tokens: Annotated[float, typer.Option(min=1, help="Mean answer where a trace has none.")] = 500.0,
    max_sequences: Annotated[int | None, typer.Option(min=1, help="Sequences that a replica runs.")] = None,
    kv_tokens: Annotated[int | None, typer.Option(min=16, help="Tokens that its memory holds.")] = None,
    prefill_rate: Annotated[float | None, typer.Option(min=1, help="Prompt tokens per second.")] = None,
    itl_base: Annotated[float | None, typer.Option(min=0, help="Seconds of a step.")] = None,
    itl_per_sequence: Annotated[float | None, typer.Option(min=0, help="Seconds that each adds.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for plots (SVG); needs matplotlib.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The table as JSON.")] = False,
) -> None:
    """Run scaling policies on a trace beside a clairvoyant oracle and a proved lower bound."""
    from app.simulate.case import Options, episode_options  # numba and numpy load here only
    from app.simulate.episode import EPISODE
    from app.simulate.run import Bounds
    from app.simulate.tables import Model
    from app.simulate.trace import Lengths
    from app.simulate.trace_files import Sampling

    options = (
        episode_options()
        if trace == EPISODE
        else Options(
            source=trace,
            model=Model(max_sequences=32),
            bounds=Bounds(warm_up_s=min(warm_up, duration / 2.0)),
            sampling=Sampling(
                compression=compression,
                duration_s=duration,
                lengths=Lengths(prompt_mean=prompt_tokens, output_mean=output_tokens),
            ),
            mean_demand=mean_demand or None,
        )
    )
    changed = {
        "ttft_slo_s": slo_ttft, "tpot_slo_s": slo_tpot, "start_up_s": start_up, "max_sequences": max_sequences,
        "kv_tokens": kv_tokens, "prefill_tokens_per_s": prefill_rate, "itl_base_s": itl_base,
        "itl_per_sequence_s": itl_per_sequence,
    }  # fmt: skip
    options = _changed(
        options,
        {name: value for name, value in changed.items() if value is not None},
        {n: v for n, v in (("min_replicas", min_replicas), ("max_replicas", max_replicas)) if v is not None},
    )
    _run(options, policy or [_OURS], seeds, attainment, plots, as_json=as_json)


def _changed(options: Any, model: dict[str, Any], bounds: dict[str, int]) -> Any:
    from dataclasses import replace

    return replace(options, model=options.model._replace(**model), bounds=replace(options.bounds, **bounds))


def _run(  # noqa: PLR0913  what the command was given
    options: Any, policies: Sequence[str], seeds: int, attainment: float, plots: Path | None, *, as_json: bool
) -> None:
    from app.simulate import compare, table
    from app.simulate import plots as drawing
    from app.simulate.choices import FAMILIES, family

    names = list(FAMILIES) if "all" in policies else list(dict.fromkeys(policies))
    for name in names:
        family(name)
    if plots is not None:
        drawing.figures()
        plots.mkdir(parents=True, exist_ok=True)
    ground = compare.prepare(options, range(seeds), attainment)
    lines = [compare.oracle_line(ground)]
    examples = [ground.oracles[0]]
    curves = {}
    for name in names:
        found = compare.compare(ground, name, curve=plots is not None)
        curves[name] = found.curve
        lines.append(found.line)
        examples.append(found.example)
    if as_json:
        print_json([asdict(line) for line in lines])
    else:
        stdout().print(table.table(f"{options.source}, {seeds} seeds", lines))
    if plots is not None:
        for file in compare.draw(ground, examples, curves, plots):
            say(f"wrote {file}")
