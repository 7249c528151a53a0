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
from app.simulate.episode import EPISODE, episode
from app.simulate.trace import Lengths, Trace

_SPREAD_S = 0.5
_SAMPLE = 20_000  # requests
_FINE_S = 10.0  # steps in which a rate is followed
_AZURE = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a trace of rates becomes requests, and which part of it."""

    seed: int = 0
    compression: float = 1.0  # rates change so many times faster; the rates themselves stay
    times: float = 1.0  # so much more load: rates are multiplied, requests repeated within a second
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


@dataclass(frozen=True, kw_only=True, eq=False)
class MeanLoad:
    """What a trace brings on average."""

    rate_rps: float
    sample: Trace  # whose lengths are the trace's; its times mean nothing


def mean_load(source: str, sampling: Sampling) -> MeanLoad:
    """The mean rate of a whole trace as it is, and lengths like its own."""
    path = Path(source)
    if not path.is_dir():
        trace = read(source, Sampling(seed=sampling.seed, compression=sampling.compression))
        return MeanLoad(rate_rps=len(trace) / max(trace.duration_s, 1.0), sample=trace)
    clients = [_windows(file) for file in _files(path)]
    prompt, output = sampling.lengths.draw(_SAMPLE, np.random.default_rng(0))
    none = np.zeros(_SAMPLE, np.int64)
    sample = Trace(name=source, arrive_s=none * 1.0, prompt_tokens=prompt, output_tokens=output, tenant=none)
    rate = sum(w.rate_rps for c in clients for w in c) / max(len(c) for c in clients)
    return MeanLoad(rate_rps=rate, sample=sample)


def azure(path: Path, sampling: Sampling) -> Trace:
    """A CSV with TIMESTAMP, ContextTokens, GeneratedTokens.

    It holds requests: more load repeats each of them within half a second either way, which the seed draws.

    Raises:
        InvalidRequest: other columns, or a value that is none.
    """
    try:
        with path.open(newline="") as file:
            rows = csv.reader(file)
            header = next(rows, [])
            if header != _AZURE:
                raise InvalidRequest(
                    f"{path}: the columns must be {', '.join(_AZURE)}, not {', '.join(header)}"
                )
            parsed = [(datetime.fromisoformat(at[:26]), int(p), int(o)) for at, p, o in rows]
    except (ValueError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path}: {error}") from error
    if not parsed:
        raise InvalidRequest(f"{path} holds no requests")
    begin = min(at for at, _, _ in parsed)
    rng = np.random.default_rng(sampling.seed)
    seconds = np.array([(at - begin).total_seconds() for at, _, _ in parsed]) / sampling.compression
    copies = int(sampling.times) + (rng.random(len(seconds)) < sampling.times % 1.0)
    source = np.repeat(np.arange(len(seconds)), copies)
    spread = rng.uniform(-_SPREAD_S, _SPREAD_S, len(source)) if sampling.times != 1.0 else 0.0
    times_s = np.maximum(seconds[source] + spread, 0.0)
    order = np.argsort(times_s, kind="stable")
    order = order[times_s[order] <= (sampling.duration_s or np.inf)]
    source, times_s = source[order], times_s[order]
    return Trace(
        name=path.stem,
        arrive_s=times_s,
        prompt_tokens=np.array([max(p, 1) for _, p, _ in parsed])[source],
        output_tokens=np.array([max(o, 1) for _, _, o in parsed])[source],
        tenant=np.zeros(len(source), np.int64),
        duration_s=float(times_s[-1]) if len(times_s) else 0.0,
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
    files = _files(folder)
    rng = np.random.default_rng(sampling.seed)
    clients = [_windows(file) for file in files]
    window_s = clients[0][1].at_s - clients[0][0].at_s if len(clients[0]) > 1 else 600.0
    whole_s = max(windows[-1].at_s for windows in clients) + window_s
    taken_s = min((sampling.duration_s or np.inf) * sampling.compression, whole_s)
    begin_s = float(rng.uniform(0.0, whole_s - taken_s))
    part = _Part(begin_s=begin_s, end_s=begin_s + taken_s, window_s=window_s, sampling=sampling)
    arrive = [_arrivals(client, part, rng) for client in clients]
    times_s = np.concatenate(arrive)
    order = np.argsort(times_s, kind="stable")
    prompt, output = sampling.lengths.draw(len(order), rng)
    return Trace(
        name=folder.name,
        arrive_s=times_s[order],
        prompt_tokens=prompt,
        output_tokens=output,
        tenant=np.repeat(np.arange(len(files)), [len(times) for times in arrive])[order],
        tenants=len(files),
        duration_s=taken_s / sampling.compression,
    )


def _files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*-trace.csv"))
    if not files:
        raise InvalidRequest(f"{folder} holds no *-trace.csv files")
    return files


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


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Which part of a trace is taken, and how."""

    begin_s: float
    end_s: float
    window_s: float
    sampling: Sampling


def _arrivals(windows: list[_Window], part: _Part, rng: np.random.Generator) -> Any:
    """When one client's requests come: a renewal process whose rate follows the rows.

    Between the middles of two windows the rate is a straight line. Gaps have the shape of their window's row and
    are counted in expected requests (time change), so that a changing or scaled rate keeps it.
    """
    sampling, window_s = part.sampling, part.window_s
    edges = np.arange(part.begin_s, part.end_s + _FINE_S, _FINE_S).clip(max=part.end_s)
    middles = np.array([w.at_s + window_s / 2.0 for w in windows])
    rate = np.interp(edges, middles, [w.rate_rps for w in windows]) * sampling.times / sampling.compression
    due = np.concatenate(
        [[0.0], np.cumsum((rate[1:] + rate[:-1]) / 2.0 * np.diff(edges))]
    )  # expected until then
    found = []
    for window in windows:
        first, last = np.interp([window.at_s, window.at_s + window_s], edges, due)
        if last > first:
            found.append(first + _gaps(window, last - first, rng))
    came = np.concatenate(found) if found else np.zeros(0)
    return (np.interp(came, due, edges) - part.begin_s) / sampling.compression


def _gaps(window: _Window, expected: float, rng: np.random.Generator) -> Any:
    """Where requests lie on a stretch that expects so many: the count is kept but for its fraction."""
    count = int(expected) + int(rng.random() < expected % 1.0)
    shape = window.shape if window.shape > 0.0 else 1.0
    gaps = rng.weibull(shape, count + 1) if window.pattern == "Weibull" else rng.gamma(shape, 1.0, count + 1)
    times = np.cumsum(gaps)
    return times[:-1] * (expected / max(times[-1], 1e-300))
