"""Tokens on their way from the engine's step to the client's event stream, 64 streams at once.

    python -m tests.benchmarks.token_path [--quick] [--json FILE]

Unpaced: the scripted engine steps as fast as it can. Paced: 50 steps per second, every token an event of its own.
Counted is the processor time of all of Shoal's processes, engine included, by role; the load process is not. Every
stream's events are counted, and its text is compared with the unary answer to the same request. Unpaced, Shoal joins
what a reader has not read: its events may hold several tokens, while each send of the baselines is one.

In HAProxy mode and in Serve's default mode. Beside it: bare uvicorn that sends preformatted frames; an application
on Serve that streams over a handle, by reference (Serve's default) and by value; Dynamo's frontend alone, and with
its mocker. The idle processes' draw was measured before and is left out; the rows that end in `_with_idle` have it.
`--quick`: Shoal in HAProxy mode and bare uvicorn.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

from tests.benchmarks import peers
from tests.benchmarks.engine_servers import ServerDied
from tests.benchmarks.environments import NotInstalled
from tests.benchmarks.measured import LoadFailed, Target, haproxy_mode
from tests.benchmarks.report import Row, parser, publish
from tests.benchmarks.serve_peers import application
from tests.benchmarks.token_path_rounds import FULL, QUICK, STEP_S, STREAMS, Figures, Lost, Plan, measure
from tests.conftest import app_of, config_of, running_system

NOT_RUN = (NotInstalled, ServerDied, LoadFailed, Lost)
PACES = ("unpaced", "paced")
HANDLES = ("by_value", "by_reference")
CONTEXT_TOKENS = 8192

Found = dict[tuple[str, str], Figures]  # by server and pace


def config(plan: Plan, *, handles: bool) -> dict:
    """Two models, with and without pace, and Serve's handle streams beside them where wanted."""
    base = config_of("scripted", auth={"mode": "open"}, retrieval=None)
    template = app_of(base, "build_model")
    models = []
    for name in PACES:
        model = deepcopy(template)
        model["name"] = model["args"]["model"] = name
        model["args"]["engine"]["scripted"] = {
            "max_sequences": STREAMS,
            "context_tokens": CONTEXT_TOKENS,
            "kv_tokens": STREAMS * CONTEXT_TOKENS,
            "itl_base_s": STEP_S if name == "paced" else 0,
            "itl_per_sequence_s": 0,
            "prefill_tokens_per_s": None,
            "output_tokens": plan.unpaced_tokens,
        }
        model["deployments"] = [{"name": "LLMReplica", "num_replicas": 1}]
        models.append(model)
    base["applications"] = [*models, app_of(base, "build_gateway")]
    if handles:
        base["applications"] += [application(how, by_reference=how == "by_reference") for how in HANDLES]
    return base


class Run:
    """What was found, and why the rest was not.

    Args:
        plan: how much is streamed.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.found: Found = {}
        self.reasons: dict[str, str] = {}

    def system(self, prefix: str, env: dict[str, str], *, handles: bool) -> None:
        """Shoal in one of Serve's modes; with `handles`, Serve's own streams beside it."""
        with running_system(config(self.plan, handles=handles), **env) as system:
            for pace in PACES:
                target = Target(url=system.http, model=pace, pids=(system.process.pid,))
                self.found[f"{prefix}shoal", pace] = measure(
                    target,
                    self.plan,
                    paced=pace == "paced",
                    unpaced_tokens=self.plan.unpaced_tokens,
                    checked=True,
                )
                for how in HANDLES if handles else ():
                    at = replace(target, path=f"/{how}/v1/chat/completions")
                    self.baseline(f"{prefix}serve_handle_{how}", at, pace, self.plan.unpaced_slow_tokens)

    def uvicorn(self) -> None:
        """Bare uvicorn."""
        with peers.backend() as target:
            for pace in PACES:
                self.baseline("uvicorn_sse", target, pace, self.plan.unpaced_tokens)

    def dynamo(self) -> None:
        """Dynamo; its mocker keeps the pace, so each pace needs its own."""
        for pace in PACES:
            try:
                with peers.dynamo(peers.PACED if pace == "paced" else peers.UNPACED) as target:
                    self.found["dynamo", pace] = measure(
                        target, self.plan, paced=pace == "paced", unpaced_tokens=self.plan.unpaced_tokens
                    )
            except NOT_RUN as error:
                self.reasons[f"dynamo_{pace}"] = str(error)

    def baseline(self, name: str, target: Target, pace: str, unpaced_tokens: int) -> None:
        """A server that takes its pace from the request."""
        paced = pace == "paced"
        extra = {"step_s": STEP_S} if paced else {}
        try:
            self.found[name, pace] = measure(
                target, self.plan, paced=paced, unpaced_tokens=unpaced_tokens, extra=extra
            )
        except NOT_RUN as error:
            self.reasons[f"{name}_{pace}"] = str(error)


def rows(run: Run) -> list[Row]:
    found = run.found
    out = []

    def add(
        name: str, value: float, unit: str, baseline: str | None = None, beside: float | None = None
    ) -> None:
        out.append(Row(name=name, value=value, unit=unit, baseline=baseline, baseline_value=beside))

    dynamo = found.get(("dynamo", "paced"))
    if dynamo is not None:
        ours = found["shoal", "paced"].us_per_token
        add(
            "shoal_paced_over_dynamo",
            ours / dynamo.by_role["frontend"],
            "ratio",
            "Dynamo's frontend alone",
            1.0,
        )
        add(
            "shoal_paced_over_dynamo_and_mocker",
            ours / dynamo.us_per_token,
            "ratio",
            "Dynamo with mocker",
            1.0,
        )
    for (name, pace), figures in sorted(found.items(), key=lambda item: not item[0][0].endswith("shoal")):
        bare = found.get(("uvicorn_sse", pace)) if name != "uvicorn_sse" else None
        beside = "bare uvicorn SSE" if bare is not None else None
        add(f"{name}_{pace}_us_per_token", figures.us_per_token, "µs", beside, bare and bare.us_per_token)
        add(f"{name}_{pace}_us_per_token_with_idle", figures.us_per_token_with_idle, "µs")
        rate = f"{pace}_tokens_per_s" if name == "shoal" else f"{name}_{pace}_tokens_per_s"
        add(rate, figures.tokens_per_s, "1/s", beside, bare and bare.tokens_per_s)
        if figures.tokens_per_event > 1:
            add(f"{name}_{pace}_tokens_per_event", figures.tokens_per_event, "tokens")
    for (name, pace), figures in found.items():
        if name.endswith("shoal") or name == "dynamo":
            for role, spent in figures.by_role.most_common():
                add(f"{name}_{pace}_us_per_token of {role}", spent, "µs")
    add("load_generator_busiest", max(figures.load_busy for figures in found.values()), "of a core")
    for name, why in run.reasons.items():
        add(f"{name}_not_run", 0.0, f"could not run: {why}")
    return out


def main() -> None:
    chosen = parser(__doc__.partition("\n")[0]).parse_args()
    run = Run(QUICK if chosen.quick else FULL)
    parts: list[Callable[[], None]] = [
        run.uvicorn, lambda: run.system("", haproxy_mode(), handles=not chosen.quick),
    ]  # fmt: skip
    if not chosen.quick:
        parts += [lambda: run.system("default_mode_", {}, handles=True), run.dynamo]
    for part in parts:
        part()
    title = f"Tokens to event streams, {STREAMS} streams, paced ones at {1 / STEP_S:g} steps/s, HAProxy mode"
    publish(title, rows(run), chosen.json)
    print("Every stream's tokens were counted; Shoal's text was compared with the unary answer.")


if __name__ == "__main__":
    main()
