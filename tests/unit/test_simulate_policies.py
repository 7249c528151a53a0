"""Baselines against their sources, and the oracle against what it claims."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.serve.autoscaling_policy import _apply_delay_logic

from app.simulate.baselines import Knative, LlmD, Ray, RaySettings
from app.simulate.case import Case
from app.simulate.episode import EPISODE_BOUNDS, EPISODE_MODEL, episode
from app.simulate.oracle import lower_bound_s, oracle, plan
from app.simulate.policies import Schedule
from app.simulate.run import Bounds, simulate
from app.simulate.tables import Model
from app.simulate.trace import Trace


def seen(
    now: float, *, running: int = 0, queued: int = 0, ready: int = 1, target: int = 1
) -> SimpleNamespace:
    """What a policy looks at."""
    return SimpleNamespace(
        now=now, running=running, queued=queued, ready=ready, target=target, concurrency=lambda: 10.0
    )


@settings(max_examples=40, deadline=None)
@given(loads=st.lists(st.integers(0, 40), min_size=20, max_size=80))
def test_the_ray_baseline_decides_as_rays_own_code_does(loads):
    ours = Ray(
        "ray",
        RaySettings(metrics_interval_s=1.0, look_back_period_s=1.0, upscale_delay_s=5, downscale_delay_s=9),
    )
    config = SimpleNamespace(upscale_delay_s=5.0, downscale_delay_s=9.0, downscale_to_zero_delay_s=None)
    theirs, state, mine = 3, {}, 3
    for second, load in enumerate(loads):
        desired = max(-(-load // 2), 1)
        theirs, state = _apply_delay_logic(desired, theirs, config, state, _now=float(second))
        wanted = ours.decide(seen(float(second), running=load, target=mine, ready=mine))
        mine = max(wanted, 1)
        assert mine == theirs


def test_knative_scales_to_its_share_of_the_concurrency_over_a_minute():
    policy = Knative()
    decided = [policy.decide(seen(float(t), running=28, ready=3)) for t in range(0, 120, 2)]
    assert decided[-1] == 4  # 28 / (0.7 * 10)


def test_knative_panics_at_twice_what_is_ready_and_does_not_go_down_meanwhile():
    policy = Knative()
    for t in range(0, 60, 2):
        policy.decide(seen(float(t), running=7, ready=1))
    for t in range(60, 68, 2):
        jumped = policy.decide(seen(float(t), running=70, ready=1))
    assert jumped >= 9
    assert policy.decide(seen(68.0, running=0, ready=10)) >= jumped


def test_llmds_law_asks_as_its_guide_says():
    law = LlmD()
    assert law._asked(1.1, 4, 4) == 8  # n + ceil(n (s / 0.55 - 1))
    assert law._asked(1.1, 8, 4) == 8  # credited with what starts
    assert law._asked(0.2, 8, 8) == 4  # n - floor(n (1 - s / 0.40))
    assert law._asked(0.5, 8, 8) == 8  # the band


def brute(need: list[int], start_up_s: float, most: int) -> float:
    """The least cost of all plans."""
    ranges = [range(max(n, 1), most + 1) for n in need]
    return min(
        sum(30.0 * n for n in p) + start_up_s * sum(max(b - a, 0) for a, b in itertools.pairwise(p))
        for p in itertools.product(*ranges)
    )


@settings(max_examples=40, deadline=None)
@given(
    need=st.lists(st.integers(0, 4), min_size=1, max_size=6),
    start_up_s=st.sampled_from([0.0, 20.0, 60.0, 200.0]),
)
def test_the_plan_is_the_cheapest_of_all_plans(need, start_up_s):
    chosen = plan(
        np.array(need, float),
        start_up_s=start_up_s,
        interval_s=30.0,
        bounds=Bounds(min_replicas=1, max_replicas=4),
    )
    cost = sum(30.0 * n for n in chosen) + start_up_s * sum(
        max(b - a, 0) for a, b in itertools.pairwise(chosen)
    )
    assert all(n >= m for n, m in zip(chosen, need, strict=True))
    assert cost == pytest.approx(brute(need, start_up_s, 4))


def test_a_schedule_orders_a_start_up_ahead():
    schedule = Schedule("s", [1, 1, 3, 1], 30.0, start_up_s=20.0)
    assert schedule.decide(SimpleNamespace(now=30.0)) == 1
    assert schedule.decide(SimpleNamespace(now=40.0)) == 3
    assert schedule.decide(SimpleNamespace(now=90.0)) == 1


def steps(seed: int = 0) -> Case:
    """Ten minutes of a load that doubles and halves."""
    rng = np.random.default_rng(seed)
    rates = np.repeat([10.0, 30.0, 15.0], 200)
    arrive = np.concatenate(
        [second + np.sort(rng.random(rng.poisson(rate))) for second, rate in enumerate(rates)]
    )
    n = len(arrive)
    trace = Trace(
        name="steps", arrive_s=arrive, prompt_tokens=np.full(n, 500), output_tokens=rng.integers(50, 150, n),
        tenant=np.zeros(n, int), duration_s=600.0,
    )  # fmt: skip
    return Case(
        trace=trace,
        model=Model(max_sequences=8, start_up_s=20.0),
        bounds=Bounds(max_replicas=12, first_replicas=2),
    )


def test_the_oracle_keeps_the_attainment_and_lies_between_the_bound_and_a_static_pool():
    of = steps()
    best = oracle(of.trace, of.model, of.bounds)
    bound = lower_bound_s(of.trace, of.model, attainment=0.99, begin_s=0.0, end_s=600.0)
    assert best.attainment >= 0.99
    assert bound <= best.replica_s <= 1.6 * bound


def test_llmds_law_on_its_episode_gives_what_llmd_published():
    results = [simulate(episode(seed), EPISODE_MODEL, LlmD(), EPISODE_BOUNDS) for seed in range(20)]
    assert np.mean([r.attainment for r in results]) == pytest.approx(0.958, abs=0.015)
    assert np.mean([r.mean_target for r in results]) == pytest.approx(5.93, abs=0.15)
