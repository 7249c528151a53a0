"""Batch fills what is left and no more: who gives a place up, when, and how often."""

import random

import pytest

from actors.policies.decisions import DispatchSettings, Granted, Preempted, ReplicaReport
from actors.policies.dispatch import Dispatcher
from actors.types import Principal, PriorityClass, Ticket

INTERACTIVE, STANDARD, BATCH = PriorityClass


def ticket(request_id, priority=BATCH, **fields):
    given = {"prompt_tokens": 10, "predicted_output_tokens": 10, "timeout_s": 1e6, **fields}
    return Ticket(request_id=request_id, principal=Principal(tenant="t", priority=priority), **given)


class Queue:
    """A dispatcher with what its gateways know."""

    def __init__(self, *, slots=2, replicas=("a",), kv_tokens=10_000, **settings):
        self.dispatcher = Dispatcher(
            settings=DispatchSettings(silent_after_s=1e9, dead_after_s=1e9, **settings), rng=random.Random(1)
        )
        self.slots, self.kv_tokens = slots, kv_tokens
        self.granted, self.preempted = [], []
        for name in replicas:
            self.report(name, 0.0)

    def report(self, name, now, **produced):
        report = ReplicaReport(
            replica_id=name,
            max_sequences=self.slots,
            kv_tokens=self.kv_tokens,
            running=list(produced),
            produced_tokens=list(produced.values()),
            start_up_s=1.0,
        )
        self.take(self.dispatcher.report(report, now))

    def submit(self, request_id, priority=BATCH, now=0.0, **fields):
        self.take(self.dispatcher.submit(ticket(request_id, priority, **fields), "g", now))

    def end(self, request_id, outcome="answered", now=0.0, **fields):
        self.take(self.dispatcher.end(request_id, outcome, now, **fields))

    def give_up(self, request_id, now=0.0, output_tokens=0, **fields):
        self.end(request_id, "retried", now, output_tokens=output_tokens)
        self.submit(request_id, now=now, returning=True, **fields)

    def take(self, decisions):
        self.granted += [d.grant.request_id for d in decisions if isinstance(d, Granted)]
        self.preempted += [d.request_id for d in decisions if isinstance(d, Preempted)]


def test_a_higher_class_that_finds_no_slot_takes_one_from_the_batch_that_has_produced_least():
    queue = Queue(slots=2, look_ahead=0)
    queue.submit("b1")
    queue.submit("b2")
    queue.report("a", 1.0, b1=50, b2=7)
    queue.submit("i", INTERACTIVE, 1.1)
    assert queue.preempted == ["b2"]
    queue.give_up("b2", 1.2)
    assert queue.granted == ["b1", "b2", "i"]
    queue.end("i", now=2.0)
    assert queue.granted[-1] == "b2"  # it goes on as soon as there is room


def test_no_more_give_up_than_are_needed_and_each_is_told_once():
    queue = Queue(slots=4, look_ahead=0)
    for number in range(4):
        queue.submit(f"b{number}")
    for number in range(2):
        queue.submit(f"i{number}", INTERACTIVE, 1.0)
        queue.report("a", 1.0 + number, b0=1, b1=2, b2=3, b3=4)
    assert queue.preempted == ["b0", "b1"]


def test_a_request_that_waits_in_an_engine_behind_batch_is_given_a_slot():
    queue = Queue(slots=2, look_ahead=1)
    queue.submit("b1")
    queue.submit("b2", now=0.5)
    queue.submit("i", STANDARD, 1.0)
    assert queue.granted == ["b1", "b2", "i"]  # ahead: it starts in the step in which the slot is free
    assert queue.preempted == ["b2"]


def test_batch_is_granted_ahead_only_while_nobody_else_has_waited_lately():
    queue = Queue(slots=1, look_ahead=1)
    queue.submit("b1")
    queue.submit("b2")
    assert queue.granted == ["b1", "b2"]
    queue.submit("i", INTERACTIVE, 1.0)
    assert queue.preempted == ["b1", "b2"]  # one that waits in the engine is no room
    for name in ("b1", "b2"):
        queue.give_up(name, 1.0)
    queue.end("i", now=1.1)
    assert queue.granted == ["b1", "b2", "i", "b1"]
    queue.report("a", 3.0, b1=1)
    assert queue.granted[-1] == "b2"


def test_nothing_is_taken_while_a_slot_is_free_or_where_it_is_not_wanted():
    queue = Queue(slots=3, look_ahead=0)
    queue.submit("b1")
    queue.submit("b2")
    queue.submit("i1", INTERACTIVE)
    assert queue.preempted == []
    still = Queue(slots=1, look_ahead=0, preempt_batch=False)
    still.submit("b1")
    still.submit("i1", INTERACTIVE)
    assert still.preempted == []


def test_batch_takes_nothing_from_batch_and_only_what_can_go_on_gives_up():
    queue = Queue(slots=2, look_ahead=0)
    queue.submit("whole", preemptible=False)
    queue.submit("s", STANDARD)
    queue.submit("b")
    queue.submit("i", INTERACTIVE)
    assert queue.preempted == []


def test_memory_is_made_on_the_replica_where_the_fewest_have_to_go():
    queue = Queue(slots=10, kv_tokens=100, replicas=("a", "b"), look_ahead=0)
    for name, prompt in (("a1", 80), ("b1", 40), ("b2", 40)):
        queue.submit(name, prompt_tokens=prompt)
    queue.submit("i", INTERACTIVE, prompt_tokens=80)
    assert queue.preempted == ["a1"]
    queue.submit("i2", INTERACTIVE)
    assert queue.granted[-2:] == ["i", "i2"]  # in rooms that are on their way
    assert queue.preempted == ["a1", "b1"]


def test_one_that_was_sent_away_three_times_without_a_token_is_left_alone_until_it_has_one():
    queue = Queue(slots=1, look_ahead=0)
    queue.submit("b")
    for number in range(5):
        queue.submit(f"i{number}", INTERACTIVE, float(number))
        if queue.preempted[-1:] == ["b"] and number < 3:
            queue.give_up("b", float(number))
            queue.end(f"i{number}", now=number + 0.5)
    assert queue.preempted == ["b"] * 3
    queue.report("a", 9.0, b=1)
    assert queue.preempted == ["b"] * 4  # it has made a step, and they wait still


@pytest.mark.parametrize(("predicted", "times"), [(100, 8), (10, 7)])
def test_one_that_makes_progress_is_sent_away_until_it_has_clearly_begun_again_each_time(predicted, times):
    queue = Queue(slots=1, look_ahead=0)
    queue.submit("b", predicted_output_tokens=predicted)
    for number in range(8):
        queue.submit(f"i{number}", INTERACTIVE, float(number))
        if len(queue.preempted) > number:
            queue.give_up("b", number, output_tokens=5, predicted_output_tokens=predicted)
        queue.end(f"i{number}", now=number + 0.5)
    assert queue.preempted == ["b"] * times
    queue.end("b", now=20.0)
    assert queue.dispatcher.placement.preemption._records == {}


def test_batch_that_had_its_turn_before_a_higher_class_keeps_it():
    queue = Queue(slots=1, look_ahead=0, class_weights={INTERACTIVE: 1.0, BATCH: 1.0})
    queue.submit("i0", INTERACTIVE)
    queue.submit("b")
    for number in range(1, 4):
        queue.submit(f"i{number}", INTERACTIVE)
    queue.end("i0", now=1.0)
    queue.end("i1", now=2.0)
    assert queue.granted == ["i0", "i1", "b"]
    assert queue.preempted == []


def test_one_whose_gateway_missed_the_message_is_asked_again():
    queue = Queue(slots=1, look_ahead=0)
    queue.submit("b")
    queue.submit("i", INTERACTIVE)
    queue.take(queue.dispatcher.sweep(1.0))
    assert queue.preempted == ["b"]
    queue.take(queue.dispatcher.sweep(3.0))
    queue.report("a", 3.1, b=1)
    assert queue.preempted == ["b", "b"]


@pytest.mark.parametrize("left", ["answered", "cancelled", "gateway", "replica"])
def test_the_books_hold_however_one_that_was_told_to_leave_ends(left):
    queue = Queue(slots=1, look_ahead=0)
    queue.submit("b")
    queue.submit("i", INTERACTIVE)
    [replica] = queue.dispatcher.pool.replicas.values()
    assert (replica.leaving_sequences, replica.leaving_tokens, replica.yielding_sequences) == (1, 20, 0)
    queue.report("a", 0.5, b=35)  # more than was predicted
    assert replica.leaving_tokens == 45
    if left == "gateway":
        queue.take(queue.dispatcher.gateway_gone("g", 1.0))
    elif left == "replica":
        queue.take(queue.dispatcher.replica_gone("a", 1.0))
    else:
        queue.end("b", left, 1.0)
        assert queue.granted[-1] == "i"
    if left != "replica":
        assert (replica.leaving_sequences, replica.leaving_tokens) == (0, 0)
    dispatcher = queue.dispatcher
    assert dispatcher.accepted == sum(dispatcher.outcomes.values()) + dispatcher.in_flight()


def test_batch_that_would_miss_its_deadline_is_not_sent_away():
    queue = Queue(slots=2, look_ahead=0)
    queue.submit("tight", timeout_s=0.7)  # so short an answer counts for 0.25 s, until one was measured
    queue.submit("patient", timeout_s=0.8)
    queue.submit("i1", INTERACTIVE)
    assert queue.preempted == ["patient"]
    queue.submit("i2", INTERACTIVE)
    assert queue.preempted == ["patient"]


def test_the_place_of_one_that_is_leaving_is_granted_at_once():
    queue = Queue(slots=2, look_ahead=1)
    queue.submit("b1")
    queue.submit("b2")
    for number in (1, 2):
        queue.submit(f"i{number}", INTERACTIVE)
        assert queue.granted[-1] == f"i{number}"
    assert sorted(queue.preempted) == ["b1", "b2"]
    queue.submit("i3", INTERACTIVE)
    queue.submit("i4", INTERACTIVE)
    assert queue.granted[-1] == "i3"  # ahead; there is no place for another one
