"""One server of the token path benchmark: streams on it, every token counted, and what each token cost.

Called by `token_path`, which knows the servers.
"""

import hashlib
import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from tests.benchmarks.measured import Sample, Target, drive, mean

STREAMS, STEP_S = 64, 0.02
TEXT = "every token of this answer has to arrive exactly once and in its place"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is streamed."""

    unpaced_tokens: int  # of each stream
    unpaced_slow_tokens: int  # the same on Serve's handle streams
    warm_up_s: float  # of the paced streams, before counting
    window_s: float
    rounds: int
    idle_s: float


QUICK = Plan(unpaced_tokens=1000, unpaced_slow_tokens=100, warm_up_s=1.0, window_s=3.0, rounds=1, idle_s=2.0)
FULL = Plan(unpaced_tokens=4000, unpaced_slow_tokens=200, warm_up_s=2.0, window_s=8.0, rounds=3, idle_s=10.0)


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One server, paced or not: medians over rounds."""

    us_per_token: float  # idle draw left out
    us_per_token_with_idle: float
    tokens_per_s: float
    tokens_per_event: float  # more than 1 where a reader lagged
    by_role: Counter[str]  # of us_per_token
    load_busy: float  # share of a core that the load process took


class Lost(Exception):
    """A token did not come, came twice or was changed."""


def measure(
    target: Target,
    plan: Plan,
    *,
    paced: bool,
    unpaced_tokens: int,
    checked: bool = False,
    extra: Mapping[str, Any] | None = None,
) -> Figures:
    """`plan.rounds` rounds on one server after a short one.

    Args:
        unpaced_tokens: of each stream, where there is no pace.
        checked: compare the text with the unary answer.
        extra: fields of the request that only this server knows.

    Raises:
        Lost: an answer is not what it must be.
        LoadFailed: the server refused, or broke off.
    """
    tokens = unpaced_tokens
    if paced:  # a little longer than is counted
        tokens = round((plan.warm_up_s + plan.window_s + 1) / STEP_S)
    digest = _digest(target, tokens) if checked else None
    whole = {"clients": STREAMS, "streams": True, "warm_up_s": 0.0, "window_s": None}
    drive(target, target.spec({**_chat(20), **(extra or {})}, **whole))
    idle = target.idle(plan.idle_s)
    load = {**whole, "warm_up_s": plan.warm_up_s, "window_s": plan.window_s} if paced else whole
    spec = target.spec({**_chat(tokens), **(extra or {})}, **load)
    samples = [drive(target, spec) for _ in range(plan.rounds)]
    idle = mean(idle, target.idle(plan.idle_s))
    for sample in samples:
        _check(sample, tokens, paced=paced, digest=digest)
    return _figures(samples, idle, tokens)


def _chat(tokens: int) -> dict[str, Any]:
    return {"max_tokens": tokens, "messages": [{"role": "user", "content": TEXT}], "stream": True}


def _digest(target: Target, tokens: int) -> str:
    """Of the text that the unary answer to the same request has."""
    body = {**_chat(tokens), "model": target.model, "stream": False}
    answer = httpx.post(target.url + target.path, json=body, timeout=120).raise_for_status().json()
    assert answer["usage"]["completion_tokens"] == tokens
    return hashlib.sha256(answer["choices"][0]["message"]["content"].encode()).hexdigest()


def _check(sample: Sample, tokens: int, *, paced: bool, digest: str | None) -> None:
    """Every token once. Without a pace a reader that lags may get several in one event: the text tells."""
    fewest, most = sample.result["fewest"], sample.result["most"]
    if (paced or digest is None) and not fewest == most == tokens:
        raise Lost(f"of {tokens} tokens per stream {fewest} to {most} came")
    if digest is not None and sample.result["digest"] != digest:
        raise Lost("the streamed text is not the unary answer's")


def _figures(samples: list[Sample], idle: Counter[str], tokens: int) -> Figures:
    """Medians over rounds."""
    roles = {role for sample in samples for role in sample.cpu_s}
    each = [sample.cpu_each(idle) for sample in samples]
    return Figures(
        us_per_token=1e6 * statistics.median(cpu.total() for cpu in each),
        us_per_token_with_idle=1e6 * statistics.median(sample.cpu_each().total() for sample in samples),
        tokens_per_event=tokens / statistics.median(sample.result["fewest"] for sample in samples),
        tokens_per_s=statistics.median(sample.per_s for sample in samples),
        by_role=Counter({role: 1e6 * statistics.median(cpu[role] for cpu in each) for role in roles}),
        load_busy=max(sample.result["load_busy"] for sample in samples),
    )
