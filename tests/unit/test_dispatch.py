"""The queue's state machine: order, credit, admission, and the conservation sum, without any actor."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.errors import DeadlineExceeded, Overloaded
from actors.policies.decisions import (
    Decision,
    DispatchSettings,
    Granted,
    Lost,
    Preempted,
    Refused,
    ReplicaReport,
)
from actors.policies.dispatch import Dispatcher
from actors.policies.marks import Marks
from actors.types import Principal, PriorityClass, Ticket


def ticket(request_id="r1", *, priority=PriorityClass.STANDARD, timeout_s=60.0, **fields):
    given = {"prompt_tokens": 10, "predicted_output_tokens": 10, **fields}
    return Ticket(
        request_id=request_id,
        principal=Principal(tenant="t", priority=priority),
        timeout_s=timeout_s,
        **given,
    )


def report(replica_id="a", *, slots=1, kv_tokens=10_000, running=(), produced=()):
    return ReplicaReport(
        replica_id=replica_id,
        max_sequences=slots,
        kv_tokens=kv_tokens,
        running=running,
        produced_tokens=produced,
        start_up_s=3.0,
    )


def queue(*, slots=1, look_ahead=0, replicas=("a",), now=0.0, **kwargs) -> Dispatcher:
    patient = {"silent_after_s": 1e9, "dead_after_s": 1e9, **kwargs}  # replicas report once, in most tests
    dispatcher = Dispatcher(settings=DispatchSettings(look_ahead=look_ahead, **patient), rng=random.Random(1))
    for replica_id in replicas:
        dispatcher.report(report(replica_id, slots=slots), now)
    return dispatcher


def granted(decisions: list[Decision]) -> list[str]:
    return [d.grant.request_id for d in decisions if isinstance(d, Granted)]


def test_a_free_slot_is_granted_at_once():
    assert granted(queue().submit(ticket(), "g", 0.0)) == ["r1"]


def test_a_freed_slot_wakes_the_next_ticket():
    dispatcher = queue()
    dispatcher.submit(ticket("r1"), "g", 0.0)
    assert granted(dispatcher.submit(ticket("r2"), "g", 0.1)) == []
    assert granted(dispatcher.end("r1", "answered", 0.5)) == ["r2"]


def test_tickets_wait_while_there_is_no_replica_and_run_when_one_registers():
    dispatcher = queue(replicas=())
    assert dispatcher.submit(ticket(), "g", 0.0) == []
    assert granted(dispatcher.report(report(), 4.0)) == ["r1"]


def test_look_ahead_grants_one_more_than_the_engine_runs():
    dispatcher = queue(look_ahead=1)
    assert granted(dispatcher.submit(ticket("r1"), "g", 0.0)) == ["r1"]
    assert granted(dispatcher.submit(ticket("r2"), "g", 0.0)) == ["r2"]
    assert granted(dispatcher.submit(ticket("r3"), "g", 0.0)) == []


def test_classes_are_served_in_order_whenever_they_arrived():
    dispatcher = queue()
    dispatcher.submit(ticket("running"), "g", 0.0)
    dispatcher.submit(ticket("batch", priority=PriorityClass.BATCH), "g", 0.1)
    dispatcher.submit(ticket("standard"), "g", 0.2)
    dispatcher.submit(ticket("interactive", priority=PriorityClass.INTERACTIVE), "g", 0.3)
    order = []
    done = "running"
    for now in (1.0, 2.0, 3.0):
        [done] = granted(dispatcher.end(done, "answered", now))
        order.append(done)
    assert order == ["interactive", "standard", "batch"]


def test_a_ticket_that_comes_back_is_served_by_its_first_arrival():
    dispatcher = queue()
    dispatcher.submit(ticket("running"), "g", 10.0)
    dispatcher.submit(ticket("newer"), "g", 11.0)
    dispatcher.submit(ticket("returning", waited_s=5.0, attempt=2), "g", 12.0)
    assert granted(dispatcher.end("running", "answered", 13.0)) == ["returning"]


def test_the_least_loaded_replica_is_chosen():
    dispatcher = queue(slots=2, replicas=("a", "b"))
    replicas = []
    for i in range(4):
        [decision] = dispatcher.submit(ticket(f"r{i}"), "g", 0.0)
        assert isinstance(decision, Granted)
        replicas.append(decision.grant.replica_id)
    assert sorted(replicas) == ["a", "a", "b", "b"]
    assert replicas[0] != replicas[1]


def test_kv_tokens_are_credit_too():
    dispatcher = queue(replicas=())
    dispatcher.report(report(slots=10, kv_tokens=100), 0.0)
    assert granted(dispatcher.submit(ticket("r1", prompt_tokens=60), "g", 0.0)) == ["r1"]
    assert granted(dispatcher.submit(ticket("r2", prompt_tokens=60), "g", 0.0)) == []
    assert granted(dispatcher.end("r1", "answered", 1.0)) == ["r2"]


def test_a_request_larger_than_a_whole_replica_runs_alone():
    dispatcher = queue(slots=2)
    assert granted(dispatcher.submit(ticket("huge", prompt_tokens=1_000_000), "g", 0.0)) == ["huge"]
    assert granted(dispatcher.submit(ticket("small"), "g", 0.0)) == []


def test_a_ticket_that_would_miss_its_deadline_is_refused_at_once_with_a_computed_retry_after():
    dispatcher = queue()
    dispatcher.estimator.observe(service_s=2.0, predicted_output_tokens=10)
    dispatcher.submit(ticket("running"), "g", 0.0)
    for i in range(5):
        dispatcher.submit(ticket(f"waiting{i}"), "g", 0.0)
    [decision] = dispatcher.submit(ticket("late", timeout_s=5.0), "g", 0.0)
    assert isinstance(decision, Refused)
    assert isinstance(decision.error, Overloaded)
    # Predicted: 2 s until the slot frees and 5 x 2 s before it; allowed: 5 s less 2 s of its own, and a margin.
    assert 9.3 <= decision.error.retry_after_s <= 9.3 + 2.0


def test_a_higher_class_is_not_refused_for_the_backlog_of_lower_ones():
    dispatcher = queue()
    dispatcher.estimator.observe(service_s=2.0, predicted_output_tokens=10)
    dispatcher.submit(ticket("running"), "g", 0.0)
    for i in range(5):
        dispatcher.submit(ticket(f"batch{i}", priority=PriorityClass.BATCH), "g", 0.0)
    vip = ticket("vip", priority=PriorityClass.INTERACTIVE, timeout_s=5.0)
    assert dispatcher.submit(vip, "g", 0.0) == []


def test_an_expired_ticket_is_dropped_when_its_turn_comes():
    dispatcher = queue()
    dispatcher.submit(ticket("running"), "g", 0.0)
    dispatcher.submit(ticket("expires", timeout_s=5.0), "g", 0.0)
    dispatcher.submit(ticket("lives"), "g", 0.0)
    assert granted(dispatcher.end("running", "answered", 6.0)) == ["lives"]
    assert dispatcher.outcomes["expired"] == 1


def test_a_cancelled_ticket_never_runs():
    dispatcher = queue()
    dispatcher.submit(ticket("running"), "g", 0.0)
    dispatcher.submit(ticket("left"), "g", 0.0)
    dispatcher.end("left", "cancelled", 0.5)
    assert granted(dispatcher.end("running", "answered", 1.0)) == []
    assert dispatcher.in_flight() == 0


def swept(dispatcher, *, until, since=0.0, reporting=()):
    """The sweeps of some seconds, beside the reports of those who live."""
    decisions = []
    for half in range(int(since * 2) + 1, int(until * 2) + 1):
        for replica_id in reporting:
            decisions += dispatcher.report(report(replica_id), half / 2)
        decisions += dispatcher.sweep(half / 2)
    return decisions


def test_the_only_replica_gets_nothing_new_when_it_is_silent_and_is_given_up_after_long():
    dispatcher = queue(replicas=("a",), silent_after_s=2.0, dead_after_s=15.0)
    dispatcher.submit(ticket("r1"), "g", 0.0)
    assert dispatcher.submit(ticket("r2"), "g", 3.0) == []
    assert swept(dispatcher, until=15.0) == []
    assert swept(dispatcher, since=15.0, until=15.5) == [Lost(replica_id="a")]
    assert dispatcher.pool.replicas == {}
    assert dispatcher.in_flight() == 2  # its gateway brings r1 back
    assert granted(dispatcher.report(report("b"), 17.0)) == ["r2"]


def test_a_silent_replica_is_given_up_at_once_where_another_one_lives():
    dispatcher = queue(slots=1, replicas=("a", "b"), silent_after_s=2.0, dead_after_s=15.0)
    [first] = dispatcher.submit(ticket("r1"), "g", 0.0)
    lost, alive = first.grant.replica_id, {"a": "b", "b": "a"}[first.grant.replica_id]
    assert swept(dispatcher, until=2.0, reporting=(alive,)) == []
    assert swept(dispatcher, since=2.0, until=2.5, reporting=(alive,)) == [Lost(replica_id=lost)]
    assert granted(dispatcher.submit(ticket("r1", returning=True), "g", 2.6)) == ["r1"]
    dispatcher.report(report(lost, running=("r1",)), 9.0)  # it wakes up, and is welcome
    assert sorted(dispatcher.pool.replicas) == ["a", "b"]
    assert (dispatcher.accepted, dispatcher.in_flight()) == (1, 1)


def test_a_replica_that_drains_is_nobody_to_go_on():
    dispatcher = queue(replicas=("a", "b"), silent_after_s=2.0, dead_after_s=15.0)
    dispatcher.replica_draining("b", 0.0)
    assert swept(dispatcher, until=5.0, reporting=("b",)) == []


def test_replicas_are_not_given_up_for_a_queue_that_stood_still():
    dispatcher = queue(replicas=("a", "b"), silent_after_s=2.0, dead_after_s=15.0)
    swept(dispatcher, until=1.0, reporting=("a", "b"))
    dispatcher.report(report("a"), 31.0)  # half a minute later; that of b is still in the mailbox
    assert dispatcher.sweep(31.0) == []
    assert dispatcher.report(report("b"), 31.1) == []
    assert swept(dispatcher, since=31.0, until=33.0, reporting=("a", "b")) == []


def test_a_known_prefix_comes_before_load_and_a_free_slot_before_both():
    dispatcher = queue(slots=2, look_ahead=1, replicas=("a", "b"))
    where = {}

    def submit(name, prefix):
        [decision] = dispatcher.submit(ticket(name, prefix=prefix), "g", 0.0)
        where[name] = decision.grant.replica_id

    submit("first", (1, 2, 3))
    submit("follows", (1, 2, 4))
    assert where["follows"] == where["first"]
    submit("other", (7,))
    assert where["other"] != where["first"]  # slots are free there only
    submit("again", (1, 2, 3))
    assert where["again"] == where["other"]


def test_the_least_loaded_of_those_that_know_nothing_is_chosen():
    dispatcher = queue(slots=4, replicas=("a", "b"))
    [one] = dispatcher.submit(ticket("r1", prefix=(1,)), "g", 0.0)
    [two] = dispatcher.submit(ticket("r2", prefix=(2,)), "g", 0.0)
    assert one.grant.replica_id != two.grant.replica_id


def producing(dispatcher, now, **produced):
    told = ReplicaReport(
        replica_id="a",
        max_sequences=10,
        kv_tokens=100,
        running=list(produced),
        produced_tokens=list(produced.values()),
        start_up_s=1.0,
    )
    return granted(dispatcher.report(told, now))


def test_an_answer_that_grows_beyond_its_prediction_takes_credit():
    dispatcher = queue(replicas=())
    producing(dispatcher, 0.0)
    dispatcher.submit(ticket("long", prompt_tokens=20, predicted_output_tokens=10), "g", 0.0)
    assert producing(dispatcher, 1.0, long=10) == []
    assert dispatcher.pool.replicas["a"].tokens == 30
    producing(dispatcher, 2.0, long=45)
    assert dispatcher.pool.replicas["a"].tokens == 65
    assert dispatcher.submit(ticket("next", prompt_tokens=30, predicted_output_tokens=10), "g", 2.0) == []
    assert granted(dispatcher.end("long", "answered", 3.0, output_tokens=50)) == ["next"]
    assert dispatcher.pool.replicas["a"].tokens == 40


def test_output_is_charged_once_whoever_tells_it_first():
    dispatcher = queue(replicas=())
    producing(dispatcher, 0.0)
    counters = dispatcher.line._classes[PriorityClass.STANDARD].counters
    dispatcher.submit(ticket("r1", prompt_tokens=20), "g", 0.0)
    assert counters.counter("t") == 20 + 2 * 10  # as predicted
    producing(dispatcher, 1.0, r1=10)
    producing(dispatcher, 1.5, r1=11)
    assert counters.counter("t") == 20 + 2 * 11
    dispatcher.replica_gone("a", 2.0)
    dispatcher.end("r1", "retried", 2.0, output_tokens=12)
    assert counters.counter("t") == 20 + 2 * 12


def test_what_was_predicted_and_not_produced_is_given_back():
    dispatcher = queue(slots=2)
    counters = dispatcher.line._classes[PriorityClass.STANDARD].counters
    dispatcher.submit(ticket("short", prompt_tokens=20, predicted_output_tokens=50), "g", 0.0)
    dispatcher.submit(ticket("lost", prompt_tokens=20, predicted_output_tokens=50), "g", 0.0)
    assert counters.counter("t") == 240
    dispatcher.end("short", "answered", 1.0, output_tokens=5)
    assert counters.counter("t") == 20 + 2 * 5 + 120
    dispatcher.replica_gone("a", 2.0)
    assert counters.counter("t") == 20 + 2 * 5 + 20
    line = dispatcher.line._classes[PriorityClass.STANDARD]
    assert (line._held, line._held_total, line._active_weight) == ({}, 0.0, 0.0)


def test_one_that_has_waited_too_long_to_end_in_time_is_told_so():
    dispatcher = queue()
    dispatcher.estimator.observe(service_s=4.0, predicted_output_tokens=10)
    dispatcher.submit(ticket("running"), "g", 0.0)
    dispatcher.submit(ticket("late", timeout_s=9.0), "g", 0.0)
    dispatcher.submit(ticket("next"), "g", 0.0)
    [told, given] = dispatcher.end("running", "answered", 8.0)
    assert isinstance(told, Refused)
    assert isinstance(told.error, DeadlineExceeded)
    assert given.grant.request_id == "next"
    assert (dispatcher.outcomes["expired"], dispatcher.accepted, dispatcher.in_flight()) == (1, 3, 1)


def test_a_head_that_leaves_lets_the_next_one_through():
    dispatcher = queue(replicas=())
    dispatcher.report(report(slots=10, kv_tokens=100), 0.0)
    dispatcher.submit(ticket("running", prompt_tokens=60), "g", 0.0)
    dispatcher.submit(ticket("large", prompt_tokens=60), "g", 0.0)
    assert granted(dispatcher.submit(ticket("small", prompt_tokens=1), "g", 0.0)) == []
    assert granted(dispatcher.end("large", "cancelled", 1.0)) == ["small"]


def test_the_tickets_of_a_lost_replica_come_back_at_the_head():
    dispatcher = queue(replicas=("a",))
    dispatcher.submit(ticket("lost"), "g", 0.0)
    dispatcher.submit(ticket("waiting"), "g", 1.0)
    dispatcher.replica_gone("a", 2.0)
    assert dispatcher.submit(ticket("lost", waited_s=2.0, attempt=2), "g", 2.0) == []
    assert granted(dispatcher.report(report("b"), 3.0)) == ["lost"]
    assert dispatcher.accepted == 2


def test_the_last_reports_of_a_lost_replica_do_not_bring_it_back():
    dispatcher = queue(replicas=("a",))
    dispatcher.replica_gone("a", 1.0)
    dispatcher.report(report("a"), 1.2)
    assert dispatcher.pool.replicas == {}
    dispatcher.report(report("a"), 60.0)
    assert list(dispatcher.pool.replicas) == ["a"]


def test_a_draining_replica_finishes_and_gets_nothing_new():
    dispatcher = queue(slots=2, replicas=("a",))
    dispatcher.submit(ticket("r1"), "g", 0.0)
    dispatcher.replica_draining("a", 0.1)
    assert dispatcher.submit(ticket("r2"), "g", 0.1) == []
    assert dispatcher.pool.running_sequences() == 1
    assert dispatcher.pool.capacity(PriorityClass.STANDARD).slots == 0


def test_a_new_owner_books_what_replicas_already_run():
    dispatcher = Dispatcher(settings=DispatchSettings(look_ahead=0))
    dispatcher.report(report(slots=1, running=("old",)), 0.0)
    assert dispatcher.submit(ticket("new"), "g", 0.0) == []
    assert granted(dispatcher.end("old", "answered", 1.0)) == ["new"]


def test_credit_of_a_request_that_a_replica_no_longer_knows_is_freed():
    dispatcher = queue()
    dispatcher.submit(ticket("forgotten"), "g", 0.0)
    dispatcher.submit(ticket("next"), "g", 0.0)
    assert granted(dispatcher.report(report(running=()), 1.0)) == []  # the grant may be under way
    assert granted(dispatcher.report(report(running=()), 6.0)) == ["next"]
    assert dispatcher.outcomes["failed"] == 1


def test_a_gateway_that_leaves_frees_everything_it_had():
    dispatcher = queue()
    dispatcher.submit(ticket("running"), "g1", 0.0)
    dispatcher.submit(ticket("waiting"), "g1", 0.0)
    dispatcher.submit(ticket("other"), "g2", 0.0)
    assert granted(dispatcher.gateway_gone("g1", 1.0)) == ["other"]
    assert dispatcher.outcomes["cancelled"] == 2


def test_a_retry_that_both_the_bus_and_the_gateway_tell_is_one_retry():
    dispatcher = queue(replicas=("a", "b"))
    [decision] = dispatcher.submit(ticket("r1"), "g", 0.0)
    dispatcher.replica_gone(decision.grant.replica_id, 1.0)
    dispatcher.end("r1", "retried", 1.0)
    assert granted(dispatcher.submit(ticket("r1", attempt=2), "g", 1.1)) == ["r1"]
    assert (dispatcher.accepted, dispatcher.in_flight(), dict(dispatcher.outcomes)) == (1, 1, {})


def test_a_sequence_granted_ahead_waits_and_does_not_run():
    dispatcher = queue(slots=1, look_ahead=1)
    dispatcher.submit(ticket("r1"), "g", 0.0)
    dispatcher.submit(ticket("r2"), "g", 0.0)
    assert (dispatcher.pool.running_sequences(), dispatcher.pool.waiting_ahead_sequences()) == (1, 1)


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(
            ["submit", "back", "answered", "retried", "gone", "report", "produced", "gateway", "sweep"]
        ),
        st.integers(0, 7),
        st.sampled_from(list(PriorityClass)),
    ),
    max_size=80,
)


def happen(dispatcher, event, number, priority, now):
    request_id, replica_id, gateway_id = f"q{number}", f"r{number % 3}", f"g{number % 2}"
    if event in ("submit", "back"):
        asked = ticket(request_id, priority=priority, timeout_s=6.0, returning=event == "back")
        return dispatcher.submit(asked, gateway_id, now)
    if event in ("answered", "retried"):
        return dispatcher.end(request_id, event, now, output_tokens=number)
    if event == "produced":
        here = dispatcher.pool.replicas.get(replica_id)
        running = tuple(here.held) if here is not None else ()
        known = report(replica_id, slots=2, running=running, produced=tuple(now for _ in running))
        return dispatcher.report(known, now)
    acts = {
        "gone": lambda: dispatcher.replica_gone(replica_id, now),
        "report": lambda: dispatcher.report(report(replica_id, slots=2), now),
        "sweep": lambda: dispatcher.sweep(now),
        "gateway": lambda: dispatcher.gateway_gone(gateway_id, now),
    }
    return acts[event]()


def assert_credit_is_what_is_held(replica):
    held = replica.held.values()
    leaving = [h for h in held if h.leaving_at is not None]
    assert replica.sequences == len(held)
    assert replica.tokens == sum(h.tokens() for h in held)
    assert replica.leaving_sequences == len(leaving)
    assert replica.leaving_tokens == sum(h.tokens() for h in leaving)
    assert replica.yielding_sequences == sum(h.can_leave() for h in held)


@settings(max_examples=300, deadline=None)
@given(EVENTS)
def test_whatever_happens_accepted_is_the_sum_of_all_ends_and_what_is_in_flight(events):
    dispatcher = queue(slots=2, look_ahead=1, replicas=("r0", "r1"), silent_after_s=8.0, dead_after_s=20.0)
    for now, (event, number, priority) in enumerate(events):
        decisions = happen(dispatcher, event, number, priority, now)
        for decision in decisions:
            if isinstance(
                decision, Granted
            ):  # fits once those who are leaving have left, but for the look-ahead
                assert dispatcher.pool.replicas[decision.grant.replica_id].free_sequences() >= -1
        for decision in decisions:
            if isinstance(decision, Preempted) and number % 2:  # some gateways hear it too late
                dispatcher.end(decision.request_id, "retried", now, output_tokens=1)
        assert "retried" not in dispatcher.outcomes
        assert dispatcher.accepted == sum(dispatcher.outcomes.values()) + dispatcher.in_flight()
        for replica in dispatcher.pool.replicas.values():
            assert_credit_is_what_is_held(replica)
        in_flight = {*dispatcher.line._by_id, *dispatcher.pool._granted_on, *dispatcher._returning}
        assert set(dispatcher.placement.preemption._records) <= in_flight


@pytest.mark.parametrize("slots", [1, 4])
def test_all_slots_stay_busy_while_tickets_wait(slots):
    dispatcher = queue(slots=slots)
    for i in range(100):
        dispatcher.submit(ticket(f"r{i}", timeout_s=1e6), "g", 0.0)
    running = set(dispatcher.pool.replicas["a"].held)
    for now in range(100 - slots):
        assert len(running) == slots
        running |= set(granted(dispatcher.end(done := min(running), "answered", now)))
        running.discard(done)


def test_a_ticket_goes_with_the_connection_that_submits_it_again():
    dispatcher = queue()
    dispatcher.submit(ticket("running"), "g", 0.0)
    dispatcher.submit(ticket("waiting"), "g/1", 0.0)
    dispatcher.submit(ticket("waiting", returning=True), "g/2", 0.1)
    dispatcher.gateway_gone("g/1", 0.2)
    [decision] = dispatcher.end("running", "answered", 1.0)
    assert (decision.gateway_id, decision.grant.request_id) == ("g/2", "waiting")
    assert dispatcher.accepted == 2


def test_a_grant_that_went_to_a_lost_connection_is_told_again_and_only_there():
    dispatcher = queue()
    [first] = dispatcher.submit(ticket("r1"), "g/1", 0.0)
    assert dispatcher.submit(ticket("r1", returning=True), "g/1", 0.1) == []
    [again] = dispatcher.submit(ticket("r1", returning=True), "g/2", 0.1)
    assert (again.gateway_id, again.grant) == ("g/2", first.grant)
    dispatcher.gateway_gone("g/1", 0.2)
    assert dispatcher.in_flight() == 1


def test_a_request_that_comes_back_while_another_replica_still_runs_it_is_not_swallowed():
    dispatcher = queue(replicas=())
    dispatcher.report(report("a", running=("r1",)), 0.0)  # a new owner hears what runs
    dispatcher.report(report("b"), 0.0)
    [decision] = dispatcher.submit(ticket("r1", attempt=2, returning=True), "g", 0.1)
    assert decision.grant.request_id == "r1"
    assert (dispatcher.accepted, dispatcher.in_flight()) == (1, 1)


def test_a_late_report_does_not_bring_back_a_request_that_has_ended():
    dispatcher = queue()
    dispatcher.submit(ticket("r1"), "g", 0.0)
    dispatcher.end("r1", "answered", 1.0)
    dispatcher.report(report(running=("r1",)), 1.01)  # it was on its way
    assert granted(dispatcher.submit(ticket("r2"), "g", 1.02)) == ["r2"]
    assert dispatcher.accepted == 2
    assert dict(dispatcher.outcomes) == {"answered": 1}


def test_what_was_adopted_is_freed_with_the_first_report_that_does_not_list_it():
    dispatcher = queue(replicas=())
    dispatcher.report(report(running=("old",)), 0.0)
    assert dispatcher.submit(ticket("new"), "g", 0.1) == []
    assert granted(dispatcher.report(report(running=()), 0.5)) == ["new"]


def test_an_adopted_request_teaches_nothing_about_service_times():
    dispatcher = queue(replicas=())
    dispatcher.report(report(running=("old",)), 0.0)
    dispatcher.end("old", "answered", 0.01)
    assert dispatcher.estimator.observed == 0


def test_adopted_requests_of_a_lost_replica_do_not_stay_in_flight_for_ever():
    dispatcher = queue(replicas=())
    dispatcher.report(report(running=("old",)), 0.0)
    dispatcher.replica_gone("a", 1.0)
    assert (dispatcher.in_flight(), dispatcher.outcomes["failed"]) == (0, 1)


def test_a_draining_replica_stays_so_when_it_is_lost_and_heard_of_again():
    dispatcher = queue(replicas=("a",))
    dispatcher.replica_draining("a", 0.0)
    dispatcher.replica_gone("a", 1.0)  # one gateway's bus closed, another's streams run on
    dispatcher.report(report("a"), 7.0)
    assert dispatcher.submit(ticket(), "g", 7.1) == []
    assert dispatcher.pool.capacity(PriorityClass.STANDARD).slots == 0


def test_a_new_owner_that_hears_of_draining_before_the_first_report_believes_it():
    dispatcher = queue(replicas=())
    dispatcher.replica_draining("a", 0.0)
    dispatcher.report(report("a"), 0.3)
    assert dispatcher.submit(ticket(), "g", 0.4) == []


def test_a_replica_that_was_taken_for_draining_by_mistake_serves_again():
    dispatcher = queue(replicas=("a",))
    dispatcher.replica_draining("a", 0.0)
    dispatcher.submit(ticket(), "g", 0.1)
    assert granted(dispatcher.report(report("a"), 31.0)) == ["r1"]


def test_one_that_was_let_in_before_is_not_refused_when_it_comes_back():
    dispatcher = queue(replicas=())  # no replica yet: a wait of 10 s is predicted
    assert isinstance(dispatcher.submit(ticket("new", timeout_s=5.0), "g", 0.0)[0], Refused)
    assert dispatcher.submit(ticket("back", timeout_s=5.0, returning=True), "g", 0.0) == []


def test_marks_expire_and_are_forgotten():
    marks = Marks(5.0)
    for number in range(100):
        marks.add(f"r{number}", float(number))
    assert marks.has("r99", 100.0)
    assert not marks.has("r90", 100.0)
    assert len(marks._until) <= 6


def test_a_second_start_is_not_granted_where_the_first_one_is_stuck():
    dispatcher = queue(slots=4, replicas=("a", "b"))
    [first] = dispatcher.submit(ticket("r1"), "g", 0.0)
    other = {"a": "b", "b": "a"}[first.grant.replica_id]
    for number in range(3):
        [second] = dispatcher.submit(ticket(f"r1#{number}", avoid=first.grant.replica_id), "g", 0.1)
        assert second.grant.replica_id == other


def test_a_second_start_takes_what_is_idle_or_is_refused_and_never_stands_in_line():
    dispatcher = queue(slots=1, replicas=("a",), look_ahead=1)
    dispatcher.submit(ticket("r1"), "g", 0.0)
    [refused] = dispatcher.submit(ticket("r1#2", avoid="a"), "g", 0.1)
    assert isinstance(refused, Refused)
    dispatcher.report(report("b", slots=1), 0.2)
    dispatcher.submit(ticket("r2"), "g", 0.2)
    [refused] = dispatcher.submit(
        ticket("r1#3", avoid="a"), "g", 0.3
    )  # what is left there is a place in line
    assert isinstance(refused, Refused)
    assert len(dispatcher.line) == 0


def test_two_under_which_replicas_died_do_not_run_together_until_one_has_a_token():
    dispatcher = queue(slots=10, replicas=("a", "b"))
    [one] = dispatcher.submit(ticket("s1", suspect=True), "g", 0.0)
    [two] = dispatcher.submit(ticket("s2", suspect=True), "g", 0.0)
    assert one.grant.replica_id != two.grant.replica_id
    assert dispatcher.submit(ticket("s3", suspect=True), "g", 0.0) == []
    assert granted(dispatcher.end("s1", "answered", 1.0)) == ["s3"]
    assert granted(dispatcher.submit(ticket("other"), "g", 1.0)) == ["other"]
