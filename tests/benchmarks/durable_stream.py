"""What durability adds to a stream: /v1/responses in the background and durable, beside the same stream made plainly.

    python -m tests.benchmarks.durable_stream [--quick] [--json FILE]

One system on the scripted engine (50 steps a second), Serve's default mode, one gateway, one job runner, `appended`.
TTFT: one stream at a time, both kinds in turn, to the first `response.output_text.delta`; medians. Processor time: 16
streams at once, all of Shoal's processes, the idle draw measured before and left out, per token of the answers; the
clients are not counted. Every stream's text is compared with what was asked for. The background streams run in class
batch of an empty queue.
"""

import asyncio
import json
import statistics
import time
from collections import Counter
from dataclasses import dataclass

import httpx

from tests.benchmarks.processes import cpu_by_role
from tests.benchmarks.report import Row, parser, publish
from tests.chaos.load import words
from tests.conftest import System, app_of, config_of, running_system

STREAMS, TOKENS = 16, 200
ALONE, QUICK_ALONE = 40, 10  # streams of each kind, for TTFT
ROUNDS, QUICK_ROUNDS = 5, 1  # of processor time
IDLE_S = 4
KINDS = (False, True)


@dataclass(frozen=True, kw_only=True)
class Read:
    """One stream."""

    ttft_s: float
    events: int  # that carried text


async def read(http: httpx.AsyncClient, system: System, *, background: bool, text: str) -> Read:
    """Ask and read to the end.

    Raises:
        RuntimeError: the text is not what was asked for.
    """
    body = {"model": "scripted", "input": text, "temperature": 0, "stream": True, "background": background}
    started, first, parts = time.perf_counter(), 0.0, []
    async with http.stream("POST", f"{system.http}/v1/responses", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith('data: {"type":"response.output_text.delta"'):
                first = first or time.perf_counter()
                parts.append(json.loads(line[6:])["delta"])
    if "".join(parts) != text:
        raise RuntimeError(f"{background=}: {''.join(parts)[:80]!r} is not {text[:80]!r}")
    return Read(ttft_s=first - started, events=len(parts))


async def measure(system: System, alone: int, rounds: int) -> list[Row]:
    limits = httpx.Limits(max_connections=2 * STREAMS)
    async with httpx.AsyncClient(timeout=120, limits=limits) as http:
        for kind in KINDS:
            await read(http, system, background=kind, text=words(0, 20))
        ttft: dict[bool, list[float]] = {kind: [] for kind in KINDS}
        for number in range(alone):
            for kind in KINDS:
                found = await read(http, system, background=kind, text=words(number, 10))
                ttft[kind].append(found.ttft_s * 1e3)
        idle = await _idle(system)
        spent: dict[bool, Counter[str]] = {kind: Counter() for kind in KINDS}
        events = dict.fromkeys(KINDS, 0)
        for _ in range(rounds):
            for kind in KINDS:
                cpu, count = await _together(http, system, idle, background=kind)
                spent[kind].update(cpu)
                events[kind] += count
    tokens = rounds * STREAMS * TOKENS
    rows = []
    plain, durable = (statistics.median(ttft[kind]) for kind in KINDS)
    rows.append(
        Row(name="durable_ttft_ms", value=durable, unit="ms", baseline="plain stream", baseline_value=plain)
    )
    rows.append(Row(name="added_ttft_ms", value=durable - plain, unit="ms"))
    plain, durable = (spent[kind].total() / tokens * 1e6 for kind in KINDS)
    rows.append(
        Row(
            name="durable_us_per_token",
            value=durable,
            unit="µs",
            baseline="plain stream",
            baseline_value=plain,
        )
    )
    rows.append(Row(name="added_us_per_token", value=durable - plain, unit="µs"))
    for role, seconds in spent[True].most_common(6):
        before = spent[False][role] / tokens * 1e6
        value = seconds / tokens * 1e6
        rows.append(
            Row(name=f"of {role}", value=value, unit="µs", baseline="plain stream", baseline_value=before)
        )
    rows += [
        Row(
            name=f"tokens_per_event_{'durable' if kind else 'plain'}",
            value=tokens / events[kind],
            unit="tokens",
        )
        for kind in KINDS
    ]
    return rows


async def _idle(system: System) -> Counter[str]:
    """Processor seconds per second with nothing to do, by role."""
    before, started = cpu_by_role(system.process.pid), time.perf_counter()
    await asyncio.sleep(IDLE_S)
    after, seconds = cpu_by_role(system.process.pid), time.perf_counter() - started
    return Counter({role: (after[role] - before[role]) / seconds for role in after})


async def _together(
    http: httpx.AsyncClient, system: System, idle: Counter[str], *, background: bool
) -> tuple[Counter[str], int]:
    before, started = cpu_by_role(system.process.pid), time.perf_counter()
    reads = await asyncio.gather(
        *(read(http, system, background=background, text=words(n, TOKENS)) for n in range(STREAMS))
    )
    after, seconds = cpu_by_role(system.process.pid), time.perf_counter() - started
    spent = Counter({role: after[role] - before[role] - idle[role] * seconds for role in after})
    return spent, sum(one.events for one in reads)


def main() -> None:
    chosen = parser(__doc__.partition("\n")[0]).parse_args()
    alone, rounds = (QUICK_ALONE, QUICK_ROUNDS) if chosen.quick else (ALONE, ROUNDS)
    config = config_of("scripted", auth={"mode": "open"}, announce_url=None)
    app_of(config, "build_model")["args"]["engine"]["scripted"] = {
        "itl_base_s": 0.02, "itl_per_sequence_s": 0, "prefill_tokens_per_s": None,
    }  # fmt: skip
    with running_system(config) as system:
        rows = asyncio.run(measure(system, alone, rounds))
    publish(f"durable streams, {STREAMS} at once for processor time", rows, chosen.json)


if __name__ == "__main__":
    main()
