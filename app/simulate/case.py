"""A case: a trace at a scale, a replica and a pool's bounds; from the options of the command or of a benchmark."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from app.simulate.episode import EPISODE, EPISODE_BOUNDS, EPISODE_MODEL, episode
from app.simulate.oracle import demand, work_s
from app.simulate.run import Bounds
from app.simulate.tables import Model
from app.simulate.trace import Trace
from app.simulate.trace_files import Sampling, mean_load, read

_SETTLED_S = 60.0  # the demand of so long is met by the replicas that are there at the beginning


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """Everything of a run but the policy."""

    trace: Trace
    model: Model
    bounds: Bounds


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a trace is turned into a case."""

    source: str
    model: Model = field(default_factory=Model)
    bounds: Bounds = field(default_factory=Bounds)
    sampling: Sampling = field(default_factory=Sampling)
    mean_demand: float | None = (
        None  # scale the load until so many full replicas are busy on the mean; None: as it is
    )


def case(options: Options, seed: int) -> Case:
    """The case of one seed.

    Raises:
        InvalidRequest: the trace cannot be read.
    """
    if options.source == EPISODE:
        return Case(trace=episode(seed), model=options.model, bounds=options.bounds)
    sampling = replace(options.sampling, seed=seed)
    if options.mean_demand is not None:
        sampling = replace(sampling, times=_times(options))
        slice_ = float(demand(read(options.source, sampling), options.model).mean())
        sampling = replace(sampling, times=sampling.times * options.mean_demand / slice_)
    trace = read(options.source, sampling)
    first = float(np.max(demand(trace, options.model)[: int(_SETTLED_S / 2.0)], initial=0.0))
    ready = int(np.clip(np.ceil(first), max(options.bounds.min_replicas, 1), options.bounds.max_replicas))
    return Case(trace=trace, model=options.model, bounds=replace(options.bounds, first_replicas=ready))


def episode_options() -> Options:
    """llm-d's episode as it was run."""
    return Options(source=EPISODE, model=EPISODE_MODEL, bounds=EPISODE_BOUNDS)


def _times(options: Options) -> float:
    """How often the load must be taken for the demand of the whole trace to have the mean that is asked for."""
    natural = mean_load(options.source, options.sampling)
    busy = natural.rate_rps * float(np.mean(work_s(natural.sample, options.model)))
    return (options.mean_demand or busy) / busy
