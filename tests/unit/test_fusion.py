"""Reciprocal rank fusion: order, scale and ties."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.policies.fusion import Ranking, fuse

IDS = st.lists(st.sampled_from("abcdefghij"), unique=True)


def test_what_both_rankings_know_comes_before_what_one_is_sure_of():
    fused = fuse([Ranking(ids=["a", "b", "c"]), Ranking(ids=["d", "b", "e"])])
    assert fused[0][0] == "b"


def test_first_everywhere_scores_one_and_known_to_one_of_two_at_most_half():
    fused = dict(fuse([Ranking(ids=["a", "b"]), Ranking(ids=["a", "c"])]))
    assert fused["a"] == pytest.approx(1.0)
    assert max(fused["b"], fused["c"]) < 0.5


def test_the_formula_is_the_papers_scaled():
    fused = dict(fuse([Ranking(ids=["a"], weight=2.0), Ranking(ids=["b", "a"])], rank_constant=60))
    assert fused["a"] == pytest.approx((2 / 61 + 1 / 62) / (3 / 61))


def test_weights_decide_between_rankings_that_disagree():
    light, heavy = Ranking(ids=["a", "b"], weight=1), Ranking(ids=["b", "a"], weight=2)
    assert [one for one, _ in fuse([light, heavy])] == ["b", "a"]


def test_equals_stand_as_in_the_first_ranking():
    first, second = Ranking(ids=["x", "a"]), Ranking(ids=["a", "x"])
    assert [one for one, _ in fuse([first, second])] == ["x", "a"]


def test_a_lone_ranking_keeps_its_order_and_nothing_fuses_to_nothing():
    assert [one for one, _ in fuse([Ranking(ids=["c", "a", "b"])])] == ["c", "a", "b"]
    assert fuse([]) == []
    assert fuse([Ranking(ids=[])]) == []


@settings(deadline=None)
@given(IDS, IDS, st.floats(0.1, 5), st.floats(0.1, 5))
def test_scores_are_between_zero_and_one_descending_and_nothing_is_lost(one, two, weight_one, weight_two):
    fused = fuse([Ranking(ids=one, weight=weight_one), Ranking(ids=two, weight=weight_two)])
    scores = [score for _, score in fused]
    assert {name for name, _ in fused} == {*one, *two}
    assert scores == sorted(scores, reverse=True)
    assert all(0 < score <= 1 for score in scores)
