"""Whose turn it is by service so far: lifts, weights, ties, and bounded memory."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from actors.policies.virtual_counters import VirtualCounters


def counters(*waiting, weights=None, most_idle=10_000):
    made = VirtualCounters(weights, most_idle)
    for key in waiting:
        made.join(key)
    return made


def test_the_one_served_least_is_next():
    some = counters("a", "b")
    some.charge("a", 10)
    assert some.next() == "b"
    some.charge("b", 11)
    assert some.next() == "a"


def test_among_equals_the_one_that_came_first_is_next():
    assert counters("b", "a").next() == "b"


def test_a_weight_of_three_has_three_turns_to_one():
    some = counters("heavy", "light", weights={"heavy": 3.0})
    turns = []
    for _ in range(40):
        turns.append(some.next())
        some.charge(turns[-1], 1)
    assert turns.count("heavy") == 30


def test_one_that_comes_back_is_lifted_to_the_least_of_those_who_wait():
    some = counters("a", "b")
    some.leave("b")
    some.charge("a", 100)
    some.join("b")
    assert some.counter("b") == 100  # it did not save up turns while it was away


def test_one_that_comes_to_an_empty_line_is_lifted_to_the_last_that_left():
    some = counters("a")
    some.leave("a")
    some.charge("a", 50)  # its answers run on
    some.join("b")
    assert some.counter("b") == 50


def test_a_debt_is_not_forgiven_by_going_away():
    some = counters("a", "b")
    some.charge("a", 100)
    some.leave("a")
    some.join("a")
    assert some.next() == "b"


def test_idle_counters_are_bounded_and_the_oldest_goes_first():
    some = counters(most_idle=10)
    for number in range(100):
        some.charge(f"t{number}", 5)
    assert len(some._idle) == 10
    assert some.counter("t0") == 0
    assert some.counter("t99") == 5


def test_tenants_that_come_and_go_behind_a_blocked_one_do_not_pile_up():
    some = counters("blocked", most_idle=10)
    for number in range(1000):
        some.join(f"t{number}")
        some.leave(f"t{number}")
    assert len(some._heap) < 100
    assert some.next() == "blocked"


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000))
def test_the_lazy_heap_agrees_with_a_scan(seed):
    chance = random.Random(seed)
    keys = [f"t{number}" for number in range(8)]
    some, waiting = counters(), set()
    for _ in range(200):
        key = chance.choice(keys)
        act = chance.choice(["join", "leave", "charge", "charge"])
        if act == "charge":
            some.charge(key, chance.randrange(1, 50))
        elif act == "join":
            some.join(key)
            waiting.add(key)
        elif key in waiting:
            some.leave(key)
            waiting.discard(key)
        lowest = min((some.counter(each) for each in waiting), default=None)
        first = some.next()
        assert (first in waiting) if waiting else first is None
        if first is not None:
            assert some.counter(first) == lowest
