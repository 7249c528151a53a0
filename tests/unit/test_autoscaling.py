"""The scaling law: what it asks for, what it holds, and how a fluid pool fares under it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.policies.autoscaling import ScalingConfig, ScalingState, decide
from actors.policies.load import LoadSnapshot, merge

CONFIG = ScalingConfig(min_replicas=0, max_replicas=50, hold_s=60.0, to_zero_s=120.0)
IDLE = LoadSnapshot(work_per_request_s=0.1, replica_concurrency=10.0, start_up_s=5.0)


def load(requests: float, *, work_s: float = 0.1, running: float = 0.0, **more: float) -> LoadSnapshot:
    """`requests` in the pool, `running` of them on a replica; c* = 10 and a mean work of 0.1 s."""
    return replace(
        IDLE,
        queued=requests - running,
        running=running,
        queued_work_s=(requests - running) * work_s,
        running_work_s=running * work_s,
        **more,
    )


def settle(snapshot: LoadSnapshot, config: ScalingConfig = CONFIG, *, replicas: int = 0) -> int:
    """The decision after a long time of constant load."""
    state = ScalingState.start(replicas, now=0.0)
    for second in range(1, 600):
        replicas, state = decide(state, snapshot, config, float(second))
    return replicas


# --- what the law asks for ---------------------------------------------------------------------------


def test_littles_law_gives_each_replica_the_concurrency_it_runs_at_its_knee():
    assert settle(load(40.0, running=40.0)) == 4
    assert settle(load(41.0, running=41.0)) == 5


def test_work_is_counted_and_not_requests():
    # One prompt of 8k tokens weighs as much as sixteen of 512.
    assert settle(load(16.0, work_s=0.1, running=16.0)) == 2
    assert settle(load(1.0, work_s=1.6, running=1.0)) == 2
    assert settle(load(1.0, work_s=0.1, running=1.0)) == 1
    assert settle(load(160.0, work_s=0.1)) == settle(load(10.0, work_s=1.6)) == 4


def test_arrivals_keep_the_replicas_that_their_work_fills():
    # Few sequences at a time because each is fast on a nearly empty replica; the flow still fills 6 replicas.
    assert settle(load(8.0, running=8.0, arrival_rate_rps=60.0)) == 6


def test_what_waits_counts_like_what_runs_while_a_replica_starts_faster_than_a_request_ends():
    asleep = replace(load(40.0, running=20.0), start_up_s=0.5)
    assert settle(asleep, replace(CONFIG, slack_s=0.5)) == 4


def test_a_backlog_is_spread_over_the_time_a_new_replica_takes():
    # 20 s of work that waits; what is asked for now can help in 5 s at the earliest.
    assert settle(load(200.0)) == 4
    assert settle(replace(load(200.0), start_up_s=20.0)) == 1


def test_without_a_measured_work_every_waiting_request_gets_a_slot():
    assert settle(replace(IDLE, queued=25.0, running=5.0, work_per_request_s=0.0)) == 3


def test_replicas_in_use_are_never_given_up():
    # The mean work is overestimated, so Little asks for one replica; three are busy.
    busy = LoadSnapshot(running=30.0, running_work_s=1.0, work_per_request_s=5.0, replica_concurrency=10.0)
    assert settle(busy, replicas=3) == 3


def test_an_unknown_concurrency_starts_one_replica_and_not_the_maximum():
    unknown = LoadSnapshot(queued=60.0)
    assert decide(ScalingState.start(0, 0.0), unknown, CONFIG, 1.0)[0] == 1


# --- when ---------------------------------------------------------------------------------------------


def test_from_zero_the_first_request_brings_a_replica_at_once():
    state = ScalingState.start(0, now=0.0)
    for second in range(1000):
        replicas, state = decide(state, IDLE, CONFIG, float(second))
        assert replicas == 0
    assert decide(state, load(1.0), CONFIG, 1000.1)[0] == 1


def test_at_zero_a_rate_that_is_remembered_brings_nothing():
    state = ScalingState.start(0, now=0.0)
    for tenth in range(100):
        replicas, state = decide(state, replace(IDLE, arrival_rate_rps=30.0), CONFIG, tenth / 10)
        assert replicas == 0


def test_a_hair_above_a_whole_replica_starts_none():
    assert settle(load(20.1, running=20.1)) == 2


def test_from_zero_a_burst_brings_what_it_needs_at_once():
    state = ScalingState.start(0, now=0.0)
    _, state = decide(state, IDLE, CONFIG, 1.0)
    assert decide(state, load(290.0), CONFIG, 1.1)[0] in {6, 7}  # the trend may add one


def test_the_average_smooths_a_spike_unless_waiting_has_used_half_the_slack():
    _, calm = decide(ScalingState.start(1, 0.0), load(5.0, running=5.0), CONFIG, 1.0)
    spike = load(1000.0, running=10.0)
    assert decide(calm, replace(spike, oldest_age_s=0.9), CONFIG, 1.2)[0] == 2
    assert decide(calm, replace(spike, oldest_age_s=1.1), CONFIG, 1.2)[0] in {21, 22}


def test_a_step_is_overshot_by_the_trend_gain_at_most():
    state = ScalingState.start(1, 0.0)
    _, state = decide(state, load(10.0, running=10.0), CONFIG, 0.0)
    most = 0
    for tenth in range(1, 2000):
        replicas, state = decide(state, load(100.0, running=100.0), CONFIG, tenth / 10)
        most = max(most, replicas)
    assert 10 <= most <= 10 + math.ceil(CONFIG.trend_gain * 10)
    assert replicas == 10


def test_going_down_waits_until_the_peak_has_left_the_window():
    _, state = decide(ScalingState.start(0, 0.0), load(60.0, running=60.0), CONFIG, 0.0)
    held, later = [], []
    for second in range(1, 200):
        replicas, state = decide(state, load(10.0, running=10.0), CONFIG, float(second))
        (held if second <= CONFIG.hold_s else later).append(replicas)
    assert min(held) >= 6
    assert replicas == 1
    assert later == sorted(later, reverse=True)


def test_the_hold_is_at_least_three_start_ups():
    slow = replace(load(10.0, running=10.0), start_up_s=100.0)
    _, state = decide(ScalingState.start(6, 0.0), slow, CONFIG, 0.0)
    for second in range(1, 300):
        replicas, state = decide(state, slow, CONFIG, float(second))
        assert replicas == 6


def test_the_last_replica_goes_when_nothing_came_for_the_configured_time():
    _, state = decide(ScalingState.start(1, 0.0), load(1.0, running=1.0), CONFIG, 0.0)
    seen = {}
    for second in range(1, 200):
        seen[second], state = decide(state, IDLE, CONFIG, float(second))
    assert seen[119] == 1
    assert seen[120] == 0
    assert set(seen.values()) == {0, 1}


def test_a_controller_that_starts_anew_holds_the_replicas_it_finds():
    replicas, _ = decide(ScalingState.start(7, now=500.0), IDLE, CONFIG, 500.1)
    assert replicas == 7


def test_a_clock_that_steps_back_loses_nothing():
    _, state = decide(ScalingState.start(0, 100.0), load(60.0, running=60.0), CONFIG, 100.0)
    replicas, state = decide(state, load(60.0, running=60.0), CONFIG, 40.0)
    assert replicas == 6
    for second in range(41, 41 + 200):
        replicas, state = decide(state, load(10.0, running=10.0), CONFIG, float(second))
    assert replicas == 1


# --- properties ---------------------------------------------------------------------------------------

amount = st.floats(0.0, 1e4, allow_subnormal=False)  # means of what rounds to nothing are nothing
snapshots = st.builds(
    LoadSnapshot,
    queued=amount,
    running=amount,
    queued_work_s=amount,
    running_work_s=amount,
    arrival_rate_rps=amount,
    work_per_request_s=st.floats(0.0, 100.0),
    oldest_age_s=amount,
    replica_concurrency=st.floats(0.0, 512.0),
    start_up_s=st.floats(0.0, 300.0),
)
bounds = st.tuples(st.integers(0, 20), st.integers(1, 40)).filter(lambda pair: pair[0] <= pair[1])
GROWING = ("queued", "running", "queued_work_s", "running_work_s", "arrival_rate_rps", "oldest_age_s")


@given(history=st.lists(st.tuples(st.floats(0.0, 400.0), snapshots), min_size=1, max_size=20), bound=bounds)
def test_every_decision_is_within_its_bounds(history, bound):
    config = replace(CONFIG, min_replicas=bound[0], max_replicas=bound[1])
    now, state = 0.0, ScalingState.start(bound[0], 0.0)
    for step_s, snapshot in history:
        now += step_s
        replicas, state = decide(state, snapshot, config, now)
        assert config.min_replicas <= replicas <= config.max_replicas
        assert replicas >= min(1, config.max_replicas) or not snapshot.has_work()
        assert list(state.peaks) == sorted(state.peaks, key=lambda peak: -peak[1])
        assert len(state.peaks) <= config.max_replicas + 1


@given(before=snapshots, now_=snapshots, more=st.dictionaries(st.sampled_from(GROWING), amount))
def test_more_load_never_asks_for_fewer_replicas(before, now_, more):
    _, state = decide(ScalingState.start(1, 0.0), before, CONFIG, 0.0)
    heavier = replace(now_, **{name: getattr(now_, name) + extra for name, extra in more.items()})
    assert decide(state, heavier, CONFIG, 3.0)[0] >= decide(state, now_, CONFIG, 3.0)[0]


@given(snapshot=snapshots, step_s=st.floats(0.05, 5.0))
def test_constant_load_never_flaps(snapshot, step_s):
    state, decisions = ScalingState.start(0, 0.0), []
    for step in range(400):
        replicas, state = decide(state, snapshot, CONFIG, step * step_s)
        decisions.append(replicas)
    assert len(set(decisions)) == 1


@given(snapshot=snapshots, queued=st.floats(0.01, 1e4))
def test_whatever_waits_at_zero_replicas_brings_one_at_once(snapshot, queued):
    waiting = replace(snapshot, queued=queued)
    assert decide(ScalingState.start(0, 0.0), waiting, CONFIG, 0.0)[0] >= 1


# --- a pool under the law ------------------------------------------------------------------------------


@dataclass
class FluidPool:
    """Work flows in, ready replicas take it off; a replica is ready `start_up_s` after it was asked for."""

    start_up_s: float
    config: ScalingConfig
    ready_at: list[float] = field(default_factory=list)
    work_s: float = 0.0  # in the pool, running and waiting
    target: int = 0
    reversals: int = 0
    most: int = 0
    spent_s: float = 0.0  # replica-seconds

    def run(self, rate: Callable[[float], float], until_s: float, step_s: float = 0.25) -> None:
        """Requests of 0.1 s of work at `rate(t)`; c* = 10, so a request stays a second on a full replica."""
        state, last_move, now = ScalingState.start(0, 0.0), 0, 0.0
        while now < until_s:
            now += step_s
            ready = sum(at <= now for at in self.ready_at)
            self.work_s = max(self.work_s + (0.1 * rate(now) - ready) * step_s, 0.1 * rate(now))
            requests, slots = self.work_s / 0.1, ready * 10.0
            snapshot = replace(
                load(requests, running=min(requests, slots)),
                arrival_rate_rps=rate(now),
                start_up_s=self.start_up_s,
                oldest_age_s=max(requests - slots, 0.0) / max(slots, 10.0),
            )
            self.target, state = decide(state, snapshot, self.config, now)
            move = self.target - len(self.ready_at)
            if move * last_move < 0:
                self.reversals += 1
            last_move = move or last_move
            self.ready_at += [now + self.start_up_s] * move
            self.ready_at = sorted(self.ready_at)[: self.target]
            self.most = max(self.most, self.target)
            self.spent_s += len(self.ready_at) * step_s


@pytest.mark.parametrize(("start_up_s", "overhead"), [(0.5, 1.05), (5.0, 1.15), (60.0, 1.4)])
def test_a_pool_reaches_what_a_step_needs_and_gives_the_rest_back(start_up_s, overhead):
    pool = FluidPool(start_up_s, replace(CONFIG, max_replicas=100))
    pool.run(lambda t: 20.0 if t < 300.0 else 80.0, until_s=1500.0)
    assert pool.work_s <= 0.1 * 80.0 * 1.01  # the backlog is gone
    assert 8 <= pool.target <= 9
    assert pool.reversals <= 3  # up at first, down to what settles, and again with the step
    assert pool.spent_s <= overhead * (2 * 300.0 + 8 * 1200.0)  # beside who knows the future


def test_a_pool_that_is_left_alone_goes_to_zero_and_comes_back():
    pool = FluidPool(5.0, replace(CONFIG, max_replicas=100))
    pool.run(lambda t: 40.0 if t < 100.0 or t > 600.0 else 0.0, until_s=599.0)
    assert (pool.target, pool.work_s) == (0, 0.0)


# --- the snapshot --------------------------------------------------------------------------------------


def test_stats_go_to_serve_and_come_back_as_they_were():
    snapshot = load(12.0, running=4.0, arrival_rate_rps=3.5)
    stats = snapshot.to_stats()
    assert all(type(value) is float for value in stats.values())
    assert LoadSnapshot.from_stats({**stats, "something_else": 1.0}) == snapshot


def test_stats_that_lack_a_key_are_refused_by_its_name():
    stats = load(1.0).to_stats()
    del stats["queued_work_s"]
    with pytest.raises(ValueError, match="queued_work_s"):
        LoadSnapshot.from_stats(stats)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_what_is_no_measurement_is_refused(value):
    with pytest.raises(ValueError, match="oldest_age_s must be a finite number >= 0"):
        LoadSnapshot(oldest_age_s=value)


def test_replicas_of_a_pool_add_up_but_one_common_backlog_is_counted_once():
    mine = LoadSnapshot(queued=4.0, running=2.0, queued_work_s=8.0, arrival_rate_rps=1.0, oldest_age_s=3.0)
    other = replace(mine, running=1.0, oldest_age_s=9.0)
    summed = merge([mine, other], one_backlog=False)
    common = merge([mine, other], one_backlog=True)
    assert (summed.queued, summed.queued_work_s, summed.arrival_rate_rps) == (8.0, 16.0, 2.0)
    assert (common.queued, common.queued_work_s, common.arrival_rate_rps) == (4.0, 8.0, 1.0)
    assert summed.running == common.running == 3.0
    assert summed.oldest_age_s == common.oldest_age_s == 9.0


@given(snapshot=snapshots, one_backlog=st.booleans())
def test_merging_one_replica_changes_nothing(snapshot, one_backlog):
    merged = merge([snapshot], one_backlog=one_backlog).to_stats()
    assert merged == pytest.approx(snapshot.to_stats())


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"min_replicas": 3, "max_replicas": 2}, "min_replicas <= max_replicas"),
        ({"slack_s": 0.0}, "slack_s"),
        ({"hold_s": -1.0}, "hold_s"),
        ({"smoothing_s": math.nan}, "smoothing_s"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused_by_name(change, name):
    with pytest.raises(ValueError, match=name):
        replace(CONFIG, **change)
