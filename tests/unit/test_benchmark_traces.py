"""The traces of the benchmarks: exact counts, the spread that is asked for, the same for the same seed."""

import itertools
import random
import statistics

import pytest

from tests.benchmarks.traces import bursts, largest_gap, lengths, percentile, steady


def test_bursts_have_the_spread_that_is_asked_for_and_end_on_time():
    times = bursts(20_000, 100.0, 9.0, random.Random(3))
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert len(times) == 20_000
    assert times[-1] == pytest.approx(100.0)
    assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(9.0, rel=0.15)


def test_a_spread_of_one_is_a_steady_stream():
    times = bursts(5000, 50.0, 1.0, random.Random(3))
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(1.0, rel=0.1)


def test_the_same_seed_gives_the_same_trace():
    assert steady(50, 5.0, random.Random(1)) == steady(50, 5.0, random.Random(1))
    assert steady(50, 5.0, random.Random(1)) == sorted(steady(50, 5.0, random.Random(1)))


@pytest.mark.parametrize("count", [2, 40, 41])
def test_lengths_have_the_mean_of_their_bounds(count):
    found = lengths(count, 20, 60, random.Random(2))
    assert len(found) == count
    assert all(20 <= length <= 60 for length in found)
    assert sum(found) == pytest.approx(40 * count, abs=20 if count % 2 else 0)


@pytest.mark.parametrize(("share", "expected"), [(0.5, 50), (0.99, 99), (0.991, 100), (1.0, 100), (0.0, 1)])
def test_a_percentile_is_a_value_that_was_seen(share, expected):
    assert percentile(range(100, 0, -1), share) == expected


def test_a_percentile_of_nothing_is_zero():
    assert percentile([], 0.99) == 0.0


def test_the_largest_gap_is_over_any_interval_not_only_from_the_start():
    # The first is ahead by 3 at t=2; from there to t=5 the second gets 7 more.
    served = [(1, 1.0), (2, 2.0), (3, -4.0), (5, -3.0), (6, 2.0)]
    assert largest_gap(served) == 7.0
    assert largest_gap(reversed(served)) == 7.0
    assert largest_gap([]) == 0.0
