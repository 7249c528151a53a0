"""Saturation: how much of a pool's capacity is left when far more clients than slots are waiting.

    python -m tests.benchmarks.saturation [--quick] [--json FILE] [--haproxy]

One replica with 4 slots of 0.1 s (ideal: 40 requests/s) and 60 closed-loop clients. The baselines are Serve's
own router in the same cluster, with its default back-off and with a tuned one (2 to 20 ms): the same service time
behind `max_ongoing_requests: 4`, where callers wait in Serve. All are called over HTTP through the same proxy.
"""

import asyncio
import statistics
import time

import httpx

from tests.benchmarks.plain_serve import TUNED, application
from tests.benchmarks.report import Row, parser, publish
from tests.conftest import app_of, config_of, running_system

SLOTS, SERVICE_S, CLIENTS = 4, 0.1, 60
IDEAL_RPS = SLOTS / SERVICE_S

HAPROXY = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}


def config() -> dict:
    """The scripted system with one 4-slot replica, and the baseline beside it."""
    base = config_of("scripted", auth={"mode": "open"}, retrieval=None)
    model = app_of(base, "build_model")
    model["args"]["engine"]["scripted"] = {"max_sequences": SLOTS, "fixed_service_s": SERVICE_S}
    model["deployments"] = [{"name": "LLMReplica", "num_replicas": 1}]
    base["applications"] = [model, app_of(base, "build_gateway")]
    base["applications"] += [application("serve", SLOTS), application("serve_tuned", SLOTS, **TUNED)]
    return base


async def closed_loop(url: str, body: dict, seconds: float) -> tuple[float, float]:
    """Requests per second and p99 latency of `CLIENTS` clients that always have one request open."""
    latencies: list[float] = []
    counting = False

    async def client(http: httpx.AsyncClient, until: float) -> None:
        while time.perf_counter() < until:
            started = time.perf_counter()
            response = await http.post(url, json=body)
            response.raise_for_status()
            if counting:
                latencies.append(time.perf_counter() - started)

    limits = httpx.Limits(max_connections=CLIENTS)
    async with httpx.AsyncClient(limits=limits, timeout=120) as http:
        warm_up_s = seconds / 4
        until = time.perf_counter() + warm_up_s + seconds
        clients = [asyncio.create_task(client(http, until)) for _ in range(CLIENTS)]
        await asyncio.sleep(warm_up_s)
        counting = True
        await asyncio.sleep(seconds)
        counting = False
        done = len(latencies)
        await asyncio.gather(*clients)
    return done / seconds, statistics.quantiles(latencies, n=100)[98]


async def measure(url: str, seconds: float, rounds: int) -> dict[str, list[tuple[float, float]]]:
    chat = {"model": "scripted", "max_tokens": 8, "messages": [{"role": "user", "content": "hello there"}]}
    plain = {"service_s": SERVICE_S, "text": "done"}
    results: dict[str, list[tuple[float, float]]] = {"shoal": [], "serve": [], "serve_tuned": []}
    for _ in range(rounds):
        results["shoal"].append(await closed_loop(f"{url}/v1/chat/completions", chat, seconds))
        for name in ("serve", "serve_tuned"):
            results[name].append(await closed_loop(f"{url}/{name}", plain, seconds))
    return results


def rows(results: dict[str, list[tuple[float, float]]]) -> list[Row]:
    rps = {name: statistics.median(r for r, _ in runs) for name, runs in results.items()}
    p99 = {name: statistics.median(p for _, p in runs) for name, runs in results.items()}
    router = "Serve's router, defaults"
    return [
        Row(name="shoal_fraction_of_ideal", value=rps["shoal"] / IDEAL_RPS, unit="of 40/s",
            baseline=router, baseline_value=rps["serve"] / IDEAL_RPS),
        Row(name="serve_fraction_of_ideal", value=rps["serve"] / IDEAL_RPS, unit="of 40/s"),
        Row(name="serve_tuned_fraction_of_ideal", value=rps["serve_tuned"] / IDEAL_RPS, unit="of 40/s"),
        Row(name="shoal_rps", value=rps["shoal"], unit="1/s", baseline=router, baseline_value=rps["serve"]),
        Row(name="shoal_p99_s", value=p99["shoal"], unit="s", baseline=router, baseline_value=p99["serve"]),
        Row(name="serve_tuned_p99_s", value=p99["serve_tuned"], unit="s", baseline=router, baseline_value=p99["serve"]),
    ]  # fmt: skip


def main() -> None:
    options = parser(__doc__.partition("\n")[0])
    options.add_argument(
        "--haproxy", action="store_true", help="in HAProxy mode instead of Serve's own proxy"
    )
    chosen = options.parse_args()
    seconds, rounds = (4.0, 1) if chosen.quick else (15.0, 3)
    with running_system(config(), **(HAPROXY if chosen.haproxy else {})) as system:
        results = asyncio.run(measure(system.http, seconds, rounds))
    mode = "HAProxy mode" if chosen.haproxy else "default mode"
    publish(
        f"Saturation, {CLIENTS} clients on {SLOTS} slots of {SERVICE_S} s, {mode}", rows(results), chosen.json
    )


if __name__ == "__main__":
    main()
