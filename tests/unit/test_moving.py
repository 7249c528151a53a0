"""A burst does not hold all slots while another tenant comes: who is moved, for whom, and how often."""

import random

import pytest

from actors.policies.decisions import DispatchSettings, Granted, Preempted, ReplicaReport
from actors.policies.dispatch import Dispatcher
from actors.types import Principal, PriorityClass, Ticket


class Queue:
    """A dispatcher, its running requests by tenant, and gateways that do as they are told."""

    def __init__(self, *, slots=4, **settings):
        self.dispatcher = Dispatcher(
            settings=DispatchSettings(silent_after_s=1e9, dead_after_s=1e9, **settings), rng=random.Random(1)
        )
        self.slots, self.tickets, self.running, self.moved = slots, {}, [], []
        self.report()

    def submit(self, *request_ids, **fields):
        """The tenant is the name without its last character."""
        for request_id in request_ids:
            given = {"prompt_tokens": 10, "predicted_output_tokens": 10, "timeout_s": 1e6, **fields}
            principal = Principal(
                tenant=request_id[:-1], priority=given.pop("priority", PriorityClass.STANDARD)
            )
            self.tickets[request_id] = Ticket(request_id=request_id, principal=principal, **given)
            self.take(self.dispatcher.submit(self.tickets[request_id], "g", 0.0))

    def end(self, request_id, outcome="answered"):
        self.running.remove(request_id)
        self.take(
            self.dispatcher.end(request_id, outcome, 0.0, output_tokens=0 if outcome == "retried" else 10)
        )

    def move(self, request_id):
        self.end(request_id, "retried")
        self.submit(request_id, returning=True)

    def report(self, **produced):
        told = ReplicaReport(
            replica_id="a",
            max_sequences=self.slots,
            kv_tokens=10_000,
            running=list(produced),
            produced_tokens=list(produced.values()),
            start_up_s=1.0,
        )
        self.take(self.dispatcher.report(told, 0.0))

    def take(self, decisions):
        self.running += [d.grant.request_id for d in decisions if isinstance(d, Granted)]
        self.moved += [d.request_id for d in decisions if isinstance(d, Preempted)]


def burst(**settings):
    queue = Queue(**settings)
    queue.submit("many1", "many2", "many3", "many4")
    return queue


def test_a_newcomer_is_started_at_once_and_one_of_the_burst_gives_its_slot_up():
    queue = burst()
    queue.report(many1=5, many2=2, many3=3, many4=4)
    queue.submit("few1")
    assert queue.running[-1] == "few1"
    assert queue.moved == ["many2"]  # it loses least


def test_what_is_moved_goes_on_when_its_turn_comes():
    queue = burst()
    queue.submit("few1")
    [moved] = queue.moved
    queue.move(moved)
    assert moved not in queue.running
    queue.end("few1")
    assert moved in queue.running


def test_a_tenant_keeps_its_share():
    queue = Queue(slots=16)
    queue.submit(*(f"many{number:x}" for number in range(16)))
    for number in range(16):
        queue.submit(f"few{number:x}")
        while queue.moved:
            queue.move(queue.moved.pop())
    tenants = [name[:-1] for name in queue.running]
    assert tenants.count("few") >= 4
    assert tenants.count("many") >= 8


def test_nobody_is_moved_for_the_tenant_that_was_served_more():
    queue = Queue(slots=4)
    queue.submit("one1", "two1", "one2", "two2")
    for number in range(3, 7):
        queue.submit(f"one{number}", f"two{number}")
    assert queue.moved == []


def test_alone_nobody_is_moved():
    queue = burst()
    queue.submit("many5", "many6")
    assert queue.moved == []
    assert "many5" in queue.running  # granted ahead


def test_a_burst_is_not_granted_ahead_while_another_tenant_runs():
    queue = Queue(slots=4)
    queue.submit("few1", "many1", "many2", "many3", "many4")
    assert "many4" not in queue.running
    queue.submit("few2")
    assert "few2" in queue.running


@pytest.mark.parametrize(
    "fields",
    [{"preemptible": False}, {"timeout_s": 12.0}],
    ids=["it cannot go on elsewhere", "it is in a hurry"],
)
def test_some_stay(fields):
    queue = Queue(slots=4)
    queue.dispatcher.estimator.observe(service_s=10.0, predicted_output_tokens=10)
    queue.submit("many1", "many2", "many3", "many4", **fields)
    queue.submit("few1")
    assert queue.moved == []


def test_a_request_is_moved_twice_at_most():
    queue = burst()
    preemption = queue.dispatcher.placement.preemption
    for produced in (5, 7):
        assert not preemption.stays(queue.tickets["many1"])
        queue.report(many1=produced, many2=9, many3=9, many4=9)
        queue.submit(f"few{produced}")
        assert queue.moved.pop() == "many1"
        queue.move("many1")
        queue.end(f"few{produced}")
        queue.dispatcher.line.charge_output(queue.tickets["many1"], 100)  # its tenant has had more again
    queue.report(many1=1, many2=9, many3=9, many4=9)
    queue.submit("few9")
    assert queue.moved.pop() != "many1"


def test_classes_do_not_mix():
    queue = Queue(slots=2)
    queue.submit("many1", "many2", priority=PriorityClass.INTERACTIVE)
    queue.submit("few1")
    assert queue.moved == []


def test_it_can_be_turned_off():
    queue = burst(preempt_tenants=False)
    queue.submit("few1")
    assert queue.moved == []
