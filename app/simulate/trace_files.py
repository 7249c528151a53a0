"""Readers of trace formats: Azure's CSV, ServeGen's folders, and llm-d's staged episode by name.

`read` tells them apart. A ServeGen folder holds rates, not requests: a seed draws them, from another part of the
trace for each seed.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from actors.errors import InvalidRequest
from app.simulate.trace import Lengths, Trace

EPISODE = "llmd"  # the name of the built-in trace
_AZURE = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]
_STAGES = ((2, 330), (4, 360), (6, 360), (8, 360), (10, 360), (4, 360), (1, 300))  # requests/s, seconds


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a trace of rates becomes requests, and which part of it."""

    seed: int = 0
    compression: float = 1.0  # rates change so many times faster; the rates themselves stay
    mean_rps: float | None = None  # scale the rates to this mean; None: as they are
    duration_s: float | None = None  # after compression; None: all of it
    lengths: Lengths = field(default_factory=Lengths)


def read(source: str, sampling: Sampling) -> Trace:
    """The trace that a name, a file or a folder stands for.

    Args:
        source: `llmd`, a CSV file of the Azure format, or a folder of `*-trace.csv` files of the ServeGen format.
        sampling: seed and scale.

    Raises:
        InvalidRequest: there is no such trace, or its format is none of these.
    """
    path = Path(source)
    if source == EPISODE:
        return episode(sampling.seed)
    if path.is_dir():
        return servegen(path, sampling)
    if path.is_file():
        return azure(path, sampling)
    raise InvalidRequest(f"no trace {source!r}: give {EPISODE}, a CSV file or a folder of *-trace.csv files")


def episode(seed: int) -> Trace:
    """llm-d's scored episode: stages of constant rate, about 4,000 tokens in and 1,000 out.

    From its guide `workload-autoscaling/slo-aware`, benchmark-templates/BENCHMARK.md; the load generator spreads
    the requests of a stage evenly, lengths vary by a tenth.
    """
    rng = np.random.default_rng(seed)
    times, start = [], 0.0
    for rate, seconds in _STAGES:
        times.append(start + (np.arange(rate * seconds) + rng.random()) / rate)
        start += seconds
    arrive = np.concatenate(times)
    n = len(arrive)
    return Trace(
        name=EPISODE,
        arrive_s=arrive,
        prompt_tokens=np.maximum(rng.normal(4000, 400, n), 1).astype(np.int64),
        output_tokens=np.maximum(rng.normal(1000, 100, n), 1).astype(np.int64),
        tenant=np.zeros(n, np.int64),
        duration_s=start,
    )


def azure(path: Path, sampling: Sampling) -> Trace:
    """A CSV with TIMESTAMP, ContextTokens, GeneratedTokens; it holds requests, so the seed changes nothing.

    Raises:
        InvalidRequest: other columns, or a value that is none.
    """
    try:
        with path.open(newline="") as file:
            rows = csv.reader(file)
            header = next(rows, [])
            if header != _AZURE:
                raise InvalidRequest(f"{path}: the columns must be {', '.join(_AZURE)}, not {', '.join(header)}")
            parsed = [(datetime.fromisoformat(at[:26]), int(p), int(o)) for at, p, o in rows]
    except (ValueError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path}: {error}") from error
    if not parsed:
        raise InvalidRequest(f"{path} holds no requests")
    begin = min(at for at, _, _ in parsed)
    seconds = np.array([(at - begin).total_seconds() for at, _, _ in parsed]) / sampling.compression
    order = np.argsort(seconds, kind="stable")
    within = order[seconds[order] <= (sampling.duration_s or np.inf)]
    return Trace(
        name=path.stem,
        arrive_s=seconds[within],
        prompt_tokens=np.array([max(p, 1) for _, p, _ in parsed])[within],
        output_tokens=np.array([max(o, 1) for _, _, o in parsed])[within],
        tenant=np.zeros(len(within), np.int64),
        duration_s=float(seconds[within[-1]]),
    )


@dataclass(frozen=True, kw_only=True)
class _Window:
    """One client's arrivals over a while: a renewal process."""

    at_s: float
    rate_rps: float
    pattern: str
    shape: float


def servegen(folder: Path, sampling: Sampling) -> Trace:
    """A folder of ServeGen's clients: each file a tenant, each row a window of one rate and burstiness.

    Gaps between requests follow the row's Gamma or Weibull shape; a scaled rate keeps it.

    Raises:
        InvalidRequest: no such files, or a row that is no window.
    """
    files = sorted(folder.glob("*-trace.csv"))
    if not files:
        raise InvalidRequest(f"{folder} holds no *-trace.csv files")
    rng = np.random.default_rng(sampling.seed)
    clients = [_windows(file) for file in files]
    ends = max(windows[-1].at_s for windows in clients)
    window_s = clients[0][1].at_s - clients[0][0].at_s if len(clients[0]) > 1 else 600.0
    whole_s = (ends + window_s) / sampling.compression
    duration_s = min(sampling.duration_s or whole_s, whole_s)
    skipped = int(rng.integers(0, max(int((whole_s - duration_s) * sampling.compression / window_s), 0) + 1))
    begin_s, end_s = skipped * window_s, skipped * window_s + duration_s * sampling.compression
    mean = sum(w.rate_rps for c in clients for w in c) * window_s / (ends + window_s)
    scale = sampling.mean_rps / mean if sampling.mean_rps else 1.0
    arrive, tenant = [], []
    for number, windows in enumerate(clients):
        times = [
            (w.at_s - begin_s) / sampling.compression + gaps
            for w in windows
            if begin_s <= w.at_s < end_s and w.rate_rps > 0.0
            for gaps in (_arrivals(w, scale, window_s / sampling.compression, rng),)
        ]
        arrive += times
        tenant.append(np.full(sum(map(len, times)), number, np.int64))
    times_s, tenants = np.concatenate(arrive), np.concatenate(tenant)
    order = np.argsort(times_s, kind="stable")
    order = order[times_s[order] < duration_s]
    prompt, output = sampling.lengths.draw(len(order), rng)
    return Trace(
        name=folder.name,
        arrive_s=times_s[order],
        prompt_tokens=prompt,
        output_tokens=output,
        tenant=tenants[order],
        tenants=len(files),
        duration_s=duration_s,
    )


def _windows(file: Path) -> list[_Window]:
    def rows() -> Iterator[_Window]:
        with file.open(newline="") as lines:
            for row in csv.reader(lines):
                at, rate, _, pattern, shape, _ = row
                yield _Window(at_s=float(at), rate_rps=float(rate), pattern=pattern, shape=float(shape or 0))

    try:
        found = list(rows())
    except ValueError as error:
        raise InvalidRequest(
            f"{file}: a row must be t_s, rate_rps, cv, pattern, shape, scale: {error}"
        ) from error
    if not found:
        raise InvalidRequest(f"{file} is empty")
    return found


def _arrivals(window: _Window, scale: float, seconds: float, rng: np.random.Generator) -> Any:
    """Arrival times within a window: gaps of the row's shape, stretched so that its number of requests fits.

    The row's rate is a count over the window, so the count is kept; only the fraction that scaling leaves is
    drawn.
    """
    expected = window.rate_rps * scale * seconds
    count = int(expected) + int(rng.random() < expected % 1.0)
    shape = window.shape if window.shape > 0.0 else 1.0
    gaps = rng.weibull(shape, count + 1) if window.pattern == "Weibull" else rng.gamma(shape, 1.0, count + 1)
    times = np.cumsum(gaps)
    return times[:-1] * (seconds / max(times[-1], 1e-300))
