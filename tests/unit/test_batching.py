"""Micro-batches by token count, and windows over long texts."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.policies.batching import BatchQueue, windows


def everyone(_item):
    return True


def push(queue, *sizes, query=False, now=0.0):
    for size in sizes:
        queue.push((size, query), size, query=query, now=now)


def sizes(batch):
    return [size for size, _ in batch]


# --- windows -----------------------------------------------------------------------------------------


def test_a_text_that_fits_is_one_window():
    assert windows(10, 10, 3) == [(0, 10)]
    assert windows(0, 10, 3) == [(0, 0)]


def test_a_text_that_is_just_too_long_is_cut_into_equal_windows():
    assert windows(11, 10, 2) == [(0, 6), (4, 11)]


@settings(deadline=None)  # how long is not what is tested
@given(st.integers(1, 5000), st.integers(2, 300), st.data())
def test_windows_cover_everything_overlap_as_asked_and_never_exceed_the_model(tokens, window, data):
    overlap = data.draw(st.integers(0, window - 1))
    spans = windows(tokens, window, overlap)
    assert spans[0][0] == 0
    assert spans[-1][1] == tokens
    for start, end in spans:
        assert 0 < end - start <= window
    for (_, end), (start, _) in pairwise(spans):
        assert end - start == overlap
    lengths = [end - start for start, end in spans]
    assert max(lengths) - min(lengths) <= 1


# --- the queue ---------------------------------------------------------------------------------------


def test_a_batch_is_full_by_padded_tokens_not_by_count():
    queue = BatchQueue(100)
    push(queue, 30, 30, 30, 30)
    assert sizes(queue.pop_batch(everyone)) == [30, 30, 30]
    assert sizes(queue.pop_batch(everyone)) == [30]
    assert queue.pop_batch(everyone) == []


def test_padding_is_what_a_longer_neighbour_costs():
    queue = BatchQueue(100)
    push(queue, 10, 60)
    assert sizes(queue.pop_batch(everyone)) == [10]  # together they would be padded to 120


def test_the_oldest_piece_leads_and_those_nearest_in_length_join_it():
    queue = BatchQueue(120)
    push(queue, 40, 5, 39, 100, 38, 6)
    assert sizes(queue.pop_batch(everyone)) == [38, 39, 40]
    assert sizes(queue.pop_batch(everyone)) == [5, 6]
    assert sizes(queue.pop_batch(everyone)) == [100]


def test_a_piece_longer_than_a_batch_goes_alone():
    queue = BatchQueue(100)
    push(queue, 500, 500)
    assert sizes(queue.pop_batch(everyone)) == [500]
    assert sizes(queue.pop_batch(everyone)) == [500]


def test_queries_go_before_passages_and_never_share_their_batch():
    queue = BatchQueue(100)
    push(queue, 10, 10)
    push(queue, 12, query=True)
    assert queue.pop_batch(everyone) == [(12, True)]
    assert queue.pop_batch(everyone) == [(10, False), (10, False)]


def test_a_flood_of_queries_slows_passages_down_and_never_stops_them():
    queue = BatchQueue(10)
    push(queue, 9)
    push(queue, *[10] * 100, query=True)
    kinds = [queue.pop_batch(everyone)[0][1] for _ in range(20)]
    assert kinds.index(False) == 16
    assert kinds.count(False) == 1


def test_a_query_waits_for_one_batch_of_passages_at_most():
    queue = BatchQueue(10)
    push(queue, *[10] * 50)
    for _ in range(20):
        assert queue.pop_batch(everyone)[0][1] is False
        push(queue, 10, query=True)
        assert queue.pop_batch(everyone)[0][1] is True


def test_what_nobody_waits_for_any_more_is_dropped():
    queue = BatchQueue(1000)
    push(queue, *range(1, 2001))
    batch = queue.pop_batch(lambda item: item[0] > 1990)
    assert sizes(batch) == [1991]  # the only one that fits
    assert len(queue) == 9
    assert queue.tokens == sum(range(1992, 2001))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 300), st.booleans()), max_size=60), st.integers(1, 2000))
def test_every_piece_comes_out_exactly_once_and_no_batch_is_over_its_bound(pieces, most):
    queue = BatchQueue(most)
    for index, (size, query) in enumerate(pieces):
        queue.push((index, size), size, query=query, now=0.0)
    assert queue.tokens == sum(size for size, _ in pieces)
    seen = []
    while batch := queue.pop_batch(everyone):
        longest = max(size for _, size in batch)
        assert longest * len(batch) <= most or len(batch) == 1
        seen += [index for index, _ in batch]
    assert sorted(seen) == list(range(len(pieces)))
    assert (queue.tokens, len(queue)) == (0, 0)


def test_it_knows_what_waits_and_for_how_long():
    queue = BatchQueue(100)
    assert queue.oldest_age_s(5.0) == 0
    push(queue, 10, now=1.0)
    push(queue, 7, query=True, now=3.0)
    assert queue.oldest_age_s(5.0) == pytest.approx(4.0)
    assert queue.tokens_before(query=True) == 7
    assert queue.tokens_before(query=False) == 17
