"""The stage clock: every moment belongs to one stage."""

import pytest

from actors.telemetry import STAGES, StageClock


class Now:
    def __init__(self):
        self.s = 0.0

    def __call__(self):
        return self.s


def test_stages_add_up_to_the_wall_time():
    now = Now()
    clock = StageClock(now)
    for stage, spent in [("auth", 0.1), ("queue", 1.0), ("prefill", 0.2), ("decode", 3.0), ("queue", 0.5)]:
        clock.enter(stage)
        now.s += spent
    assert sum(clock.stages_s().values()) == pytest.approx(clock.elapsed_s())
    assert clock.stages_s()["queue"] == pytest.approx(1.5)


def test_time_that_another_actor_measured_is_cut_out_of_the_current_stage():
    now = Now()
    clock = StageClock(now)
    clock.enter("retrieve")
    now.s += 1.0
    clock.split({"embed": 0.4})
    assert clock.stages_s()["embed"] == pytest.approx(0.4)
    assert clock.stages_s()["retrieve"] == pytest.approx(0.6)


def test_parts_larger_than_the_time_that_passed_are_scaled_down():
    now = Now()
    clock = StageClock(now)
    clock.enter("retrieve")
    now.s += 1.0
    clock.split({"embed": 3.0, "rerank": 1.0})
    assert clock.stages_s()["embed"] == pytest.approx(0.75)
    assert sum(clock.stages_s().values()) == pytest.approx(clock.elapsed_s())


def test_server_timing_lists_stages_in_order_in_milliseconds():
    now = Now()
    clock = StageClock(now)
    clock.enter("queue")
    now.s += 0.0125
    clock.enter("auth")
    now.s += 0.001
    clock.enter("other")
    assert clock.server_timing() == "auth;dur=1.00, queue;dur=12.50, other;dur=0.00"
    assert list(clock.stages_s()) == [stage for stage in STAGES if stage in clock.stages_s()]
