"""Spare replicas: what the law learns of a load that grows in the same way again, and of its SLO's burn."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.policies.autoscaling import ScalingConfig, ScalingState, decide
from actors.policies.growth import Growth
from actors.policies.load import LoadSnapshot

CONFIG = ScalingConfig(min_replicas=1, max_replicas=50, hold_s=60.0)
T_W = 60.0


def load(replicas: float, **more: float) -> LoadSnapshot:
    """What so many replicas are busy with; c* = 10, a mean work of 0.1 s."""
    running = 10.0 * replicas
    snapshot = LoadSnapshot(
        running=running,
        running_work_s=running * 0.1,
        arrival_rate_rps=10.0 * replicas,
        work_per_request_s=0.1,
        replica_concurrency=10.0,
        start_up_s=T_W,
    )
    return replace(snapshot, **more)


def follow(
    levels: list[float], config: ScalingConfig = CONFIG, **more: float
) -> tuple[list[int], ScalingState]:
    """Decisions of a load that changes once a second."""
    state, decided = ScalingState.start(1, 0.0), []
    for second, level in enumerate(levels):
        replicas, state = decide(state, load(level, **more), config, float(second))
        decided.append(replicas)
    return decided, state


def saw(seconds: int, low: float = 8.0, rise: float = 4.0, period: int = 300) -> list[float]:
    """A load that jumps up and back, again and again."""
    return [low + rise * ((second // period) % 2) for second in range(seconds)]


def test_a_load_that_jumps_again_and_again_is_met_with_replicas_that_are_ready_before():
    decided, state = follow(saw(3000))
    assert state.growth.usual() > 0.0
    assert min(decided[2100:2400]) > 8  # low again, and longer than the hold: one step is spared for
    assert max(decided) <= 12 * 1.25 + 1


def test_one_jump_in_a_long_time_is_not_usual():
    _, state = follow([4.0] * 600 + [12.0] * 2400)
    assert state.growth.usual() == 0.0


def test_where_a_replica_starts_at_once_nothing_is_spared():
    _, state = follow(saw(3000), start_up_s=3.0)
    assert state.growth == Growth()
    assert state.needs.spare == 0.0


def test_a_steady_load_needs_no_spare_replicas():
    decided, state = follow([7.0] * 1500)
    assert state.needs.spare == 0.0
    assert decided[-1] == 7


def test_late_requests_raise_the_headroom_and_an_slo_that_is_kept_lowers_it():
    _, late = follow(saw(1500), late_share=0.04)
    _, kept = follow(saw(1500), late_share=0.0)
    assert late.headroom > ScalingState.start(1, 0.0).headroom > kept.headroom
    assert late.needs.spare >= kept.needs.spare


def test_lateness_just_at_the_slo_changes_nothing():
    _, state = follow([5.0] * 1000, late_share=1.0 - CONFIG.slo_target)
    assert state.headroom == pytest.approx(ScalingState.start(1, 0.0).headroom)


def test_a_burst_that_nothing_could_meet_does_not_buy_replicas_for_hours():
    _, state = follow([5.0] * 120, late_share=1.0)
    assert state.headroom < ScalingState.start(1, 0.0).headroom + 0.1


def test_while_nothing_runs_no_headroom_is_lost():
    state = ScalingState.start(1, 0.0)
    for second in range(3600):
        _, state = decide(state, load(0.0), CONFIG, float(second))
    assert state.headroom == ScalingState.start(1, 0.0).headroom


def test_in_panic_nothing_comes_on_top_of_what_the_backlog_asks_for():
    _, state = follow(saw(3000))
    assert state.needs.spare > 0.0
    _, panics = decide(state, load(8.0, oldest_age_s=10.0), CONFIG, 3001.0)
    assert panics.needs.spare == 0.0


@settings(deadline=None, max_examples=50)
@given(
    levels=st.lists(st.floats(0.0, 40.0), min_size=50, max_size=400),
    late=st.floats(0.0, 1.0),
    step_s=st.floats(0.1, 20.0),
)
def test_spare_replicas_are_a_quarter_of_the_demand_at_most(levels, late, step_s):
    state = ScalingState.start(1, 0.0)
    for at, level in enumerate(levels):
        replicas, state = decide(state, load(level, late_share=late), CONFIG, at * step_s)
        needs = state.needs
        assert 0.0 <= needs.spare <= 0.25 * max(needs.little, needs.flow) + 1e-9
        assert 0.25 <= state.headroom <= 2.0
        assert CONFIG.min_replicas <= replicas <= CONFIG.max_replicas
        assert len(state.growth.samples) <= 240


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0.0, 100.0), st.floats(0.0, 50.0)), max_size=200), st.floats(1.0, 200.0))
def test_growth_is_never_more_than_the_level_ever_rose(steps, horizon_s):
    growth, now = Growth(), 0.0
    for passed_s, level in steps:
        now += passed_s
        growth = growth.after(level, now, horizon_s)
    highest = max((level for _, level in steps), default=0.0)
    assert 0.0 <= growth.usual() <= highest


@pytest.mark.parametrize("target", [0.0, 1.0, -0.5, 2.0])
def test_an_slo_target_that_is_no_share_is_refused(target):
    with pytest.raises(ValueError, match="slo_target"):
        replace(CONFIG, slo_target=target)
