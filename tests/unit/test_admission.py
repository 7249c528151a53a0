"""Predicted waits, who is let in, and Retry-After."""

import pytest

from actors.policies.admission import (
    Capacity,
    Demand,
    ServiceEstimator,
    is_admitted,
    predicted_wait_s,
    retry_after_s,
)
from actors.types import Principal, PriorityClass, Ticket


def capacity(slots=4, free=0, start_up_s=10.0, share=1.0):
    return Capacity(slots=slots, free_slots=free, start_up_s=start_up_s, slots_per_replica=4, share=share)


def ticket(predicted=10, sequences=1):
    return Ticket(
        request_id="r",
        principal=Principal(tenant="t"),
        prompt_tokens=1,
        predicted_output_tokens=predicted,
        timeout_s=1.0,
        sequences=sequences,
    )


def test_there_is_no_wait_while_a_slot_is_free():
    assert predicted_wait_s(work_ahead_s=0.0, capacity=capacity(free=1), estimator=ServiceEstimator()) == 0.0


def test_work_ahead_drains_at_one_slot_second_per_slot_and_second():
    estimator = ServiceEstimator(mean_service_s=0.1)
    wait_s = predicted_wait_s(work_ahead_s=5.6, capacity=capacity(), estimator=estimator)
    assert wait_s == pytest.approx(0.1 / 4 + 5.6 / 4)


def test_with_no_replica_a_start_up_comes_first():
    wait_s = predicted_wait_s(work_ahead_s=4.0, capacity=capacity(slots=0), estimator=ServiceEstimator())
    assert wait_s == pytest.approx(11.0)


def test_the_first_observation_replaces_the_prior():
    estimator = ServiceEstimator()
    estimator.observe(service_s=0.1, predicted_output_tokens=20)
    assert estimator.mean_service_s == pytest.approx(0.1)
    assert estimator.service_s(ticket(predicted=40)) == pytest.approx(0.2)


def test_n_choices_are_n_times_the_work():
    estimator = ServiceEstimator(mean_service_s=1.0, mean_output_tokens=10)
    assert estimator.work_s(ticket(sequences=3)) == pytest.approx(3.0)


def test_retry_after_is_the_excess_wait_with_some_jitter_and_never_below_a_second():
    assert retry_after_s(predicted_s=12.0, allowed_s=2.0, jitter=0.0) == pytest.approx(12.0 - 0.9 * 0.8 * 2.0)
    assert retry_after_s(predicted_s=5.0, allowed_s=0.0, jitter=1.0) == pytest.approx(5.0 * 1.25)
    assert retry_after_s(predicted_s=100.0, allowed_s=0.0, jitter=1.0) == pytest.approx(102.0)
    assert retry_after_s(predicted_s=0.1, allowed_s=0.0, jitter=0.0) == 1.0


@pytest.mark.parametrize(
    ("predicted_s", "promised_s", "promised", "let_in"),
    [
        (0.0, 100.0, False, True),  # a slot is free
        (8.1, 8.1, True, False),  # it would miss its deadline, whatever it was told
        (7.0, 7.5, False, True),
        (7.0, 9.0, False, False),  # the place is promised to others
        (7.0, 9.0, True, True),  # to this one
        (3.9, 100.0, False, True),  # the line is short: nobody waits for those who may not come
    ],
)
def test_who_is_let_in(predicted_s, promised_s, promised, let_in):
    answer = is_admitted(predicted_s=predicted_s, promised_s=promised_s, allowed_s=10.0, promised=promised)
    assert answer is let_in


def test_what_higher_classes_bring_makes_the_wait_of_lower_ones_longer_and_is_forgotten():
    demand = Demand()
    for tenth in range(6000):  # 7 slot-seconds per second on 10 slots
        demand.add(PriorityClass.INTERACTIVE, 0.7, tenth / 10)
    now = 600.0
    assert demand.share_below(PriorityClass.INTERACTIVE, 10, now) == 1.0
    share = demand.share_below(PriorityClass.STANDARD, 10, now)
    assert share == pytest.approx(0.3, abs=0.03)
    assert demand.share_below(PriorityClass.STANDARD, 10, now + 360) > 0.99
    busy = capacity(share=share)
    wait_s = predicted_wait_s(work_ahead_s=5.6, capacity=busy, estimator=ServiceEstimator())
    assert wait_s == pytest.approx(
        predicted_wait_s(work_ahead_s=5.6, capacity=capacity(), estimator=ServiceEstimator()) / share
    )
