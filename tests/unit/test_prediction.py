"""Predicted output: a quantile that converges, the mean beside it, per tenant."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.policies.prediction import OutputPredictor
from actors.policies.quantile import Quantile


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    share=st.sampled_from([0.5, 0.9]),
    scale=st.sampled_from([3.0, 200.0, 20_000.0]),
    spread=st.floats(0.3, 1.5),
)
def test_the_quantile_converges_whatever_the_scale(seed, share, scale, spread):
    chance = random.Random(seed)
    quantile = Quantile(share)
    below = []
    for number in range(4000):
        value = scale * chance.lognormvariate(0.0, spread)
        if number >= 1000:
            below.append(value <= quantile.value)
        quantile.observe(value)
    assert sum(below) / len(below) == pytest.approx(share, abs=0.03)


def test_the_quantile_of_a_constant_is_the_constant():
    quantile = Quantile(0.9)
    for _ in range(500):
        quantile.observe(100.0)
    assert quantile.value == pytest.approx(100.0, rel=0.06)


def test_the_quantile_follows_a_change_ten_times_up_and_down():
    quantile = Quantile(0.9)
    for value, steps in ((100.0, 500), (1000.0, 60), (100.0, 500)):
        for _ in range(steps):
            quantile.observe(value)
        assert quantile.value == pytest.approx(value, rel=0.06)


def test_memory_is_predicted_at_the_high_end_and_limits_at_the_mean():
    predictor = OutputPredictor()
    chance = random.Random(1)
    for _ in range(2000):
        predictor.observe("a", 1000 if chance.random() < 0.2 else 100)
    assert predictor.predict("a", None) > 900
    assert 100 <= predictor.expect("a", None) < 700


def test_output_is_predicted_per_tenant_and_bounded_by_the_request():
    predictor = OutputPredictor()
    predictor.observe("a", 10)
    assert predictor.predict("a", None) == 10
    assert predictor.predict("a", 5) == 5
    assert predictor.predict("b", None) == predictor.expect("b", None) == 128


def test_an_answer_without_a_token_is_no_logarithm_of_zero():
    predictor = OutputPredictor()
    predictor.observe("a", 0)
    assert predictor.predict("a", None) == 1


def test_the_longest_unseen_tenants_are_forgotten():
    predictor = OutputPredictor()
    for number in range(10_001):
        predictor.observe(f"t{number}", 7)
    assert predictor.predict("t0", None) == 128
    assert predictor.predict("t1", None) == 7
