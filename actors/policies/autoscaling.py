"""How many replicas the load needs: Little's law on what waits and runs, in seconds of work.

Pure. `decide` maps a snapshot of the load and the memory of earlier decisions to a replica count.
`app.scaling` calls it in the Serve controller, `app.simulate` with its own clock. Measuring the load
(`actors.policies.load`), starting replicas and draining them is left to others.

The law, every term in replicas:

    demand   L_run / c* + W_queue / max(T, slack, T_w)   what runs, and what waits spread over the time it has
    little   demand + g * max(0, d demand / dt) * T_w    smoothed over `smoothing_s`
    flow     arrival rate * work per request             what keeps arriving, on full replicas; smoothed
    spare    h * usual growth, a quarter at most         what demand usually grows by while a replica starts
    busy     running / c*                                never below what runs now
    up       max(max(little, flow) + spare, busy), rounded up, at once
    down     the largest `up` of the last max(hold, 3 * T_w) seconds
    zero     nothing waited or ran for `to_zero_s`; anything that waits makes it one, at once

c* is the number of sequences that one replica runs at its knee, T = c* * work per request the time that a
request stays on it, L_run the running requests in requests of mean work, T_w the measured start-up time. As
long as T is the longest, demand is Little's law itself: (L_run + L_queue) / c*. With a slow start it asks for
less: slots turn over while a replica starts, so one for everybody who waits would be too many. From zero and
in panic (the oldest wait has used half of the slack) nothing is smoothed, and nothing is spared on top.

The usual growth (`actors.policies.growth`) is learnt from the load itself. h is a slow integral over the SLO's
burn: it rises while more requests are late than `slo_target` allows and falls while fewer are. g is 0 unless set:
at equal attainment, a projected slope cost more than the usual growth on every trace that was tried.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from actors.policies.growth import Growth
from actors.policies.load import LEAST_WORK_S, LoadSnapshot

_TOLERANCE = 0.02  # of a replica: noise a hair above n does not start a machine
_FLOW_SMOOTHING = 3.0  # arrivals are counted, so noisier than what runs: smoothed over so many `smoothing_s`
_FIRST_HEADROOM = 0.5  # h, before anything is known
_HEADROOM = (0.25, 2.0)  # its bounds
_HEADROOM_S = 7200.0  # in which it falls by 1 while nobody is late
_MOST_SPARE = 0.25  # of the demand
_MOST_BURN = 5.0  # times the budget: a burst that nothing could have met must not buy replicas for hours
_HOLD_START_UPS = 3.0  # giving up a replica sooner than it takes to get it back thrice is flapping


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingConfig:
    """Bounds and time constants of one pool."""

    min_replicas: int = 0
    max_replicas: int = 1
    slack_s: float = 2.0  # wait that the TTFT SLO leaves: SLO less the time to the first token when idle
    smoothing_s: float = 5.0  # time constant of the moving average of the demand
    trend_gain: float = 0.0  # g: share of the projected slope that is provided for
    hold_s: float = 180.0  # replicas are given up when they were not needed for so long
    to_zero_s: float = 300.0  # the last one, when nothing came for so long
    expected_start_up_s: float = 10.0  # until a start-up was measured
    slo_target: float = 0.99  # share of the requests that are to meet their SLOs

    def __post_init__(self) -> None:
        """Refuse bounds that contradict each other and times that are none.

        Raises:
            ValueError: naming the field and what is allowed.
        """
        if not 0 <= self.min_replicas <= self.max_replicas:
            raise ValueError(
                f"0 <= min_replicas <= max_replicas must hold, not {self.min_replicas}, {self.max_replicas}"
            )
        for name in ("slack_s", "smoothing_s", "expected_start_up_s"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number > 0, not {getattr(self, name)!r}")
        for name in ("trend_gain", "hold_s", "to_zero_s"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number >= 0, not {getattr(self, name)!r}")
        if not 0.0 < self.slo_target < 1.0:
            raise ValueError(f"slo_target must lie between 0 and 1, not {self.slo_target!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What each term of the law asks for, in replicas: the reasons of a decision."""

    little: float = 0.0
    flow: float = 0.0
    busy: float = 0.0
    spare: float = 0.0  # on top of the first two

    def replicas(self, most: int) -> int:
        """The largest term, rounded up, `most` at most."""
        return math.ceil(min(max(max(self.little, self.flow) + self.spare, self.busy) - _TOLERANCE, most))


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingState:
    """What a decision remembers for the next one. Make the first with `start`."""

    replicas: int  # the last decision
    decided_at: float
    last_work_at: float  # when something last waited or ran
    level: float | None = None  # moving average of the demand, replicas; none before the first snapshot
    trend: float = 0.0  # moving average of its slope, replicas per second
    peaks: tuple[tuple[float, int], ...] = ()  # (when last, `up`): falling, the first is the held one
    needs: Needs = Needs()
    flow: float | None = None  # moving average of the flow, replicas
    growth: Growth = field(default_factory=Growth)  # of the level, while a replica starts
    headroom: float = _FIRST_HEADROOM  # h

    @classmethod
    def start(cls, replicas: int, now: float) -> ScalingState:
        """The memory of a controller that knows nothing but the replicas it finds: it holds them."""
        return cls(
            replicas=replicas,
            decided_at=now,
            last_work_at=now if replicas > 0 else -math.inf,
            peaks=((now, replicas),),
        )


def decide(
    state: ScalingState, snapshot: LoadSnapshot, config: ScalingConfig, now: float
) -> tuple[int, ScalingState]:
    """The replicas that the pool should have now.

    Args:
        state: from `ScalingState.start` or the last decision.
        snapshot: the load now.
        config: bounds and time constants.
        now: seconds of any clock, the same one for all decisions of a state; a step back counts as none.

    Returns:
        The replica count, within the bounds, and the state for the next decision.
    """
    start_up_s = snapshot.start_up_s or config.expected_start_up_s
    demand, busy = _demand(snapshot, horizon_s=max(config.slack_s, start_up_s))
    level, trend = _smoothed(state, demand, config, start_up_s, now)
    urgent = state.replicas == 0 or snapshot.oldest_age_s > config.slack_s / 2.0
    elapsed_s = max(now - state.decided_at, 0.0)
    flow = _smoothed_flow(state, snapshot, config, elapsed_s)
    growth = state.growth.after(level, now, start_up_s - config.slack_s - config.smoothing_s)
    headroom = _headroom(state.headroom, snapshot, config, elapsed_s)
    little = (max(level, demand) if urgent else level) + config.trend_gain * max(trend, 0.0) * start_up_s
    spare = 0.0 if urgent else min(headroom * growth.usual(), _MOST_SPARE * max(little, flow))
    arriving = max(flow, _arriving(snapshot)) if urgent else flow
    needs = Needs(little=little, flow=arriving, busy=busy, spare=spare)
    up = min(max(needs.replicas(config.max_replicas), int(snapshot.has_work())), config.max_replicas)
    if state.replicas == 0 and not snapshot.has_work():
        up = 0  # averages that still remember the last load start nothing
    hold_s = max(config.hold_s, _HOLD_START_UPS * start_up_s)
    peaks = _remember(state.peaks, up, now, hold_s)
    last_work_at = now if snapshot.has_work() else min(state.last_work_at, now)
    held = _not_to_zero_yet(peaks[0][1], idle_s=now - last_work_at, to_zero_s=config.to_zero_s)
    replicas = min(max(held, config.min_replicas), config.max_replicas)
    return replicas, ScalingState(
        replicas=replicas,
        decided_at=now,
        last_work_at=last_work_at,
        level=level,
        trend=trend,
        peaks=peaks,
        needs=needs,
        flow=flow,
        growth=growth,
        headroom=headroom,
    )


def _smoothed_flow(
    state: ScalingState, snapshot: LoadSnapshot, config: ScalingConfig, elapsed_s: float
) -> float:
    """Replicas that the arrivals fill, as a moving average."""
    if state.flow is None:
        return _arriving(snapshot)
    weight = -math.expm1(-elapsed_s / (_FLOW_SMOOTHING * config.smoothing_s))
    return state.flow + (_arriving(snapshot) - state.flow) * weight


def _arriving(snapshot: LoadSnapshot) -> float:
    """Replicas that the arrivals of the last seconds fill."""
    return snapshot.arrival_rate_rps * snapshot.work_per_request_s


def _headroom(h: float, snapshot: LoadSnapshot, config: ScalingConfig, elapsed_s: float) -> float:
    """The next h: up with more late requests than the SLO allows, down with fewer."""
    if not snapshot.has_work():
        return h
    burn = min(snapshot.late_share / (1.0 - config.slo_target), _MOST_BURN)
    low, high = _HEADROOM
    return min(max(h + (burn - 1.0) * elapsed_s / _HEADROOM_S, low), high)


def _demand(snapshot: LoadSnapshot, *, horizon_s: float) -> tuple[float, float]:
    """The first term of the law, and the replicas that the running sequences fill.

    Args:
        snapshot: the load; without a known c* nothing follows from it but that there is some.
        horizon_s: the time that what waits has, if that is longer than a request stays on a replica: nothing
            that is asked for now can help before T_w.
    """
    if snapshot.replica_concurrency <= 0.0:
        return 0.0, 0.0
    width = max(snapshot.replica_concurrency, 1.0)
    mean_s = snapshot.work_per_request_s
    if mean_s < LEAST_WORK_S:
        return (snapshot.running + snapshot.queued) / width, snapshot.running / width
    running = snapshot.running_work_s / mean_s / width
    waiting = snapshot.queued_work_s / max(mean_s * width, horizon_s)
    return running + waiting, snapshot.running / width


def _smoothed(
    state: ScalingState, demand: float, config: ScalingConfig, start_up_s: float, now: float
) -> tuple[float, float]:
    """Demand and its slope as moving averages over irregular steps.

    The slope is averaged over the time that it is projected ahead, so a step adds at most `trend_gain` times
    itself.
    """
    elapsed_s = now - state.decided_at
    if state.level is None:
        return demand, 0.0
    if elapsed_s <= 0.0:
        return state.level, state.trend
    level = state.level + (demand - state.level) * -math.expm1(-elapsed_s / config.smoothing_s)
    slope = (level - state.level) / elapsed_s
    horizon_s = max(start_up_s, config.smoothing_s)
    trend = state.trend + (slope - state.trend) * -math.expm1(-elapsed_s / horizon_s)
    return level, trend


def _remember(
    peaks: tuple[tuple[float, int], ...], up: int, now: float, hold_s: float
) -> tuple[tuple[float, int], ...]:
    """The falling sequence of maxima of the last `hold_s` seconds, `up` included."""
    kept = [(min(at, now), n) for at, n in peaks if n > up and now - at <= hold_s]
    return (*kept, (now, up))


def _not_to_zero_yet(held: int, *, idle_s: float, to_zero_s: float) -> int:
    """The last replica stays until nothing came for `to_zero_s`; then it goes."""
    if idle_s < to_zero_s:
        return max(held, 1)
    return 0 if held <= 1 else held
