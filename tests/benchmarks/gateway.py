"""What a request costs in the gateway alone: unary chats to an engine that takes no time, beside other gateways.

    python -m tests.benchmarks.gateway [--quick] [--json FILE]

Shoal in HAProxy mode with API keys, without retrieval: gateway, queue, replica and everything else that runs are
counted. Beside it, one after another and under the same load: LiteLLM's proxy (a master key) and the Rust routers
smg and vllm-router (which authenticate and limit nothing) before a backend of zero service time whose own cost is
not counted; Dynamo's frontend with its mocker, both counted, as Shoal's engine is; and an application on Serve that
passes the request over a handle, in Shoal's own cluster. 1 and 16 closed-loop clients; medians over windows.

Processor time per request is what the load adds: the draw of the idle processes was measured before and left out,
and is in the rows that end in `_with_idle`. Requests per core are per second of that added processor time.
`--quick`: Shoal and LiteLLM, one short window each.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

from tests.benchmarks import peers
from tests.benchmarks.engine_servers import ServerDied
from tests.benchmarks.environments import NotInstalled
from tests.benchmarks.measured import LoadFailed, Sample, Target, drive, haproxy_mode, mean
from tests.benchmarks.paced_pool import key
from tests.benchmarks.report import Row, parser, publish
from tests.benchmarks.serve_peers import application
from tests.conftest import app_of, config_of, running_system

CLIENTS = (1, 16)
CHAT = {"max_tokens": 8, "messages": [{"role": "user", "content": "hello there"}]}
PEERS = ("litellm", "smg", "vllm_router", "dynamo", "serve_pass_through")
NOT_RUN = (NotInstalled, ServerDied, LoadFailed)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long to look."""

    warm_up_s: float
    window_s: float
    windows: int
    idle_s: float


QUICK = Plan(warm_up_s=1.0, window_s=3.0, windows=1, idle_s=2.0)
FULL = Plan(warm_up_s=3.0, window_s=8.0, windows=3, idle_s=10.0)


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One server under one number of clients: medians over windows."""

    p50_ms: float
    p99_ms: float
    rps: float
    cpu_ms: float  # per request, idle draw left out
    cpu_ms_with_idle: float
    load_busy: float  # share of a core that the load process took
    by_role: Counter[str]  # of cpu_ms

    @property
    def rps_per_core(self) -> float:
        """Requests per second of processor time."""
        return 1e3 / self.cpu_ms


Found = dict[int, Figures]


def config(*, beside: bool) -> dict:
    """The scripted system with an engine that answers at once; `beside` it the Serve application."""
    base = config_of("scripted", retrieval=None)
    model = app_of(base, "build_model")
    model["args"]["engine"]["scripted"] = {"fixed_service_s": 0}
    model["deployments"] = [{"name": "LLMReplica", "num_replicas": 1}]
    base["applications"] = [app_of(base, "build_local_services"), model, app_of(base, "build_gateway")]
    if beside:
        base["applications"].append(application("plain", by_reference=False))
    return base


@contextmanager
def shoal(*, beside: bool) -> Iterator[Target]:
    """Shoal as it is deployed: HAProxy mode, API keys."""
    with running_system(config(beside=beside), **haproxy_mode()) as system:
        headers = key(system, "benchmark")
        yield Target(url=system.http, model="scripted", pids=(system.process.pid,), headers=headers)


def measure(target: Target, plan: Plan) -> Found:
    """Both numbers of clients, `plan.windows` times in turn."""
    for clients in CLIENTS:  # connections, buses, caches, code paths
        drive(target, target.spec(CHAT, clients=clients, streams=False, warm_up_s=0.5, window_s=2.0))
    idle = target.idle(plan.idle_s)
    samples: dict[int, list[Sample]] = {clients: [] for clients in CLIENTS}
    for _ in range(plan.windows):
        for clients, found in samples.items():
            load = target.spec(
                CHAT, clients=clients, streams=False, warm_up_s=plan.warm_up_s, window_s=plan.window_s
            )
            found.append(drive(target, load))
    idle = mean(idle, target.idle(plan.idle_s))
    return {clients: figures(found, idle) for clients, found in samples.items()}


def figures(samples: list[Sample], idle: Counter[str]) -> Figures:
    """Medians over samples of the same load."""

    def median(value: Callable[[Sample], float]) -> float:
        return statistics.median(map(value, samples))

    roles = {role for sample in samples for role in sample.cpu_s}
    return Figures(
        p50_ms=median(lambda sample: sample.result["p50_ms"]),
        p99_ms=median(lambda sample: sample.result["p99_ms"]),
        rps=median(lambda sample: sample.per_s),
        cpu_ms=1e3 * median(lambda sample: sample.cpu_each(idle).total()),
        cpu_ms_with_idle=1e3 * median(lambda sample: sample.cpu_each().total()),
        load_busy=median(lambda sample: sample.result["load_busy"]),
        by_role=Counter(
            {role: 1e3 * median(lambda sample, role=role: sample.cpu_each(idle)[role]) for role in roles}
        ),
    )


def run(plan: Plan, *, quick: bool) -> tuple[dict[str, Found], dict[str, str]]:
    """Everything, one after another: what was found by name, and why the rest was not run."""
    found, reasons = {}, {}
    with shoal(beside=not quick) as target:
        found["gateway"] = measure(target, plan)
        if not quick:
            found["serve_pass_through"] = measure(replace(target, path="/plain/v1/chat/completions"), plan)
    starts: dict[str, Callable[[], AbstractContextManager[Target]]] = {
        "litellm": peers.litellm, "smg": peers.smg, "vllm_router": peers.vllm_router,
        "dynamo": lambda: peers.dynamo(peers.UNPACED),
    }  # fmt: skip
    for name, start in starts.items():
        if name == "litellm" or not quick:
            try:
                with start() as target:
                    found[name] = measure(target, plan)
            except NOT_RUN as error:
                reasons[name] = str(error)
    return found, reasons


def rows(found: dict[str, Found], reasons: dict[str, str]) -> list[Row]:
    ours, litellm = found["gateway"], found.get("litellm")
    out = []
    if litellm is not None:
        ratio = ours[16].rps_per_core / litellm[16].rps_per_core
        out.append(
            Row(
                name="rps_per_core_over_litellm",
                value=ratio,
                unit="ratio",
                baseline="LiteLLM",
                baseline_value=1.0,
            )
        )
    units = {
        "p50_ms": "ms", "p99_ms": "ms", "rps": "1/s", "cpu_ms": "ms", "cpu_ms_with_idle": "ms",
        "rps_per_core": "1/s",
    }  # fmt: skip
    for name in ("gateway", *(peer for peer in PEERS if peer in found)):
        baseline = litellm if name == "gateway" else ours
        for clients in CLIENTS:
            for field, unit in units.items():
                out.append(
                    Row(
                        name=f"{name}_{field}_c{clients}",
                        value=getattr(found[name][clients], field),
                        unit=unit,
                        baseline=None if baseline is None else "LiteLLM" if name == "gateway" else "Shoal",
                        baseline_value=baseline and getattr(baseline[clients], field),
                    )
                )
    for name in ("gateway", "dynamo"):
        if name in found:
            for role, spent in found[name][16].by_role.most_common():
                out.append(Row(name=f"{name}_cpu_ms_c16 of {role}", value=spent, unit="ms"))
    busy = max(figures.load_busy for one in found.values() for figures in one.values())
    out.append(Row(name="load_generator_busiest", value=busy, unit="of a core"))
    out += [
        Row(name=f"{name}_not_run", value=0.0, unit=f"could not run: {why}") for name, why in reasons.items()
    ]
    return out


def main() -> None:
    chosen = parser(__doc__.partition("\n")[0]).parse_args()
    found, reasons = run(QUICK if chosen.quick else FULL, quick=chosen.quick)
    publish("Unary chats at zero service time", rows(found, reasons), chosen.json)
    print("Shoal checks an API key and its limits on every request, LiteLLM a master key.")
    if not chosen.quick:
        print("smg, vllm-router, Dynamo and the Serve application authenticate nothing and limit nothing.")


if __name__ == "__main__":
    main()
