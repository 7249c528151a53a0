"""The circuit breaker as a state machine over an injected clock."""

import pytest

from actors.policies.breaker import BreakerPolicy, CircuitBreaker

POLICY = BreakerPolicy(failures_to_open=3, open_s=2, max_open_s=7, probe_s=5)


@pytest.fixture
def breaker():
    return CircuitBreaker(POLICY)


def fail(breaker, times, now=0.0):
    for _ in range(times):
        assert breaker.allow(now)
        breaker.failed(now)


def test_it_opens_after_so_many_failures_in_a_row(breaker):
    fail(breaker, 2)
    assert breaker.allow(0.0)
    breaker.failed(0.0)
    assert breaker.state(0.0) == "open"
    assert not breaker.allow(1.9)
    assert breaker.retry_after_s(0.5) == pytest.approx(1.5)


def test_a_success_between_failures_starts_the_count_again(breaker):
    fail(breaker, 2)
    breaker.succeeded()
    fail(breaker, 2)
    assert breaker.state(0.0) == "closed"


def test_half_open_lets_one_probe_through_at_a_time(breaker):
    fail(breaker, 3)
    assert breaker.state(2.0) == "half_open"
    assert breaker.allow(2.0)
    assert not breaker.allow(2.1)


def test_a_probe_that_succeeds_closes_it(breaker):
    fail(breaker, 3)
    assert breaker.allow(2.0)
    breaker.succeeded()
    assert breaker.state(2.0) == "closed"
    fail(breaker, 2, now=2.0)
    assert breaker.state(2.0) == "closed"
    assert breaker.retry_after_s(2.0) == 0


def test_probes_that_fail_are_made_ever_more_rarely_up_to_a_bound(breaker):
    fail(breaker, 3)
    now, pauses = 0.0, []
    for _ in range(4):
        pause = breaker.retry_after_s(now)
        pauses.append(pause)
        now += pause
        assert breaker.allow(now)
        breaker.failed(now)
    assert pauses == [2, 4, 7, 7]
    breaker.succeeded()
    fail(breaker, 3, now)
    assert breaker.retry_after_s(now) == 2


def test_an_abandoned_probe_makes_room_for_the_next(breaker):
    fail(breaker, 3)
    assert breaker.allow(2.0)
    breaker.abandoned()
    assert breaker.allow(2.0)


def test_a_probe_that_never_reports_does_not_keep_it_open_for_ever(breaker):
    fail(breaker, 3)
    assert breaker.allow(2.0)
    assert not breaker.allow(6.9)
    assert breaker.allow(7.0)


def test_failures_of_calls_that_began_before_it_opened_change_nothing(breaker):
    fail(breaker, 3)
    breaker.failed(1.0)
    assert breaker.state(2.0) == "half_open"
    assert breaker.retry_after_s(1.0) == pytest.approx(1.0)


def test_an_abandoned_call_counts_neither_way(breaker):
    fail(breaker, 2)
    assert breaker.allow(0.0)
    breaker.abandoned()
    breaker.failed(0.0)
    assert breaker.state(0.0) == "open"
