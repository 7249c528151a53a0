"""Batch beside interactive work, simulated: it fills what is left and nobody waits for it."""

import heapq
import itertools
import random

from actors.policies.decisions import DispatchSettings, Granted, Preempted, ReplicaReport
from actors.policies.dispatch import Dispatcher
from actors.types import Principal, PriorityClass, Ticket

SLOTS = 16
HOP_S = 0.005  # one message between queue, gateway and replica
TOKENS_PER_S = 100
SERVICE_S = {PriorityClass.INTERACTIVE: 1.0, PriorityClass.BATCH: 10.0}


class Pool:
    """One replica and its clients: interactive ones at random, batch always as much as there is room for."""

    def __init__(self, *, load, batch, preempt=True, for_s=150.0):
        self.load, self.for_s = load, for_s
        self.chance, self.batch_chance = random.Random(1), random.Random(2)
        self.queue = Dispatcher(
            settings=DispatchSettings(silent_after_s=1e9, dead_after_s=1e9, preempt_batch=preempt)
        )
        self.events, self.order = [], itertools.count()
        self.priority, self.left_s, self.sent_at = {}, {}, {}
        self.running, self.waiting, self.run = {}, [], itertools.count()
        self.under_way, self.unwanted = set(), set()  # grants that have not reached the replica
        self.ttft_s, self.busy_s = [], dict.fromkeys(PriorityClass, 0.0)
        self._at(0.0, self._report)
        self._at(0.0, self._arrive)
        for _ in range(40 if batch else 0):
            self._at(0.0, self._another_batch)
        while self.events and self.events[0][0] < for_s:
            now, _, act, args = heapq.heappop(self.events)
            act(now, *args)
        for request_id in list(self.running):
            self._free(for_s, request_id)

    def p99_ttft_s(self):
        return sorted(self.ttft_s)[int(len(self.ttft_s) * 0.99)]

    def batch_share_of_what_is_left(self):
        left_s = SLOTS * self.for_s - self.busy_s[PriorityClass.INTERACTIVE]
        return self.busy_s[PriorityClass.BATCH] / left_s

    def _at(self, at_s, act, *args):
        heapq.heappush(self.events, (at_s, next(self.order), act, args))

    def _arrive(self, now):
        self._new(now, PriorityClass.INTERACTIVE, self.chance.uniform(0.5, 1.5))
        self._at(now + self.chance.expovariate(self.load * SLOTS), self._arrive)

    def _another_batch(self, now):
        self._new(now, PriorityClass.BATCH, self.batch_chance.uniform(2.0, 18.0))

    def _new(self, now, priority, service_s):
        request_id = f"q{next(self.order)}"
        self.priority[request_id], self.left_s[request_id] = priority, service_s
        self.sent_at[request_id] = now
        self._submit(now, request_id)

    def _submit(self, now, request_id, *, returning=False):
        priority = self.priority[request_id]
        ticket = Ticket(
            request_id=request_id,
            principal=Principal(tenant=priority.value, priority=priority),
            prompt_tokens=10,
            predicted_output_tokens=int(SERVICE_S[priority] * TOKENS_PER_S),
            timeout_s=1e6,
            returning=returning,
        )
        self._take(self.queue.submit(ticket, "g", now), now)

    def _take(self, decisions, now):
        for decision in decisions:
            if isinstance(decision, Granted):
                self.under_way.add(decision.grant.request_id)
                self._at(now + HOP_S, self._start, decision.grant.request_id)
            elif isinstance(decision, Preempted):
                self._at(now + HOP_S, self._give_up, decision.request_id)

    def _start(self, now, request_id):
        self.under_way.discard(request_id)
        self.waiting.append(request_id)
        if request_id in self.unwanted:
            self.unwanted.discard(request_id)
            self._give_up(now, request_id)
        self._fill(now)

    def _fill(self, now):
        while self.waiting and len(self.running) < SLOTS:
            request_id = self.waiting.pop(0)
            self.running[request_id] = (now, run := next(self.run))
            if self.priority[request_id] is PriorityClass.INTERACTIVE:
                self.ttft_s.append(now - self.sent_at[request_id])
            self._at(now + self.left_s[request_id], self._end, request_id, run)

    def _free(self, now, request_id):
        since, _ = self.running.pop(request_id)
        self.busy_s[self.priority[request_id]] += now - since
        self.left_s[request_id] -= now - since
        return int((now - since) * TOKENS_PER_S)

    def _end(self, now, request_id, run):
        if self.running.get(request_id, (0.0, -1))[1] != run:
            return  # it gave its slot up meanwhile
        produced = self._free(now, request_id)
        self._fill(now)
        self._at(now + HOP_S, self._tell_end, request_id, "answered", produced)
        if self.priority[request_id] is PriorityClass.BATCH:
            self._another_batch(now)

    def _tell_end(self, now, request_id, outcome, produced):
        self._take(self.queue.end(request_id, outcome, now, output_tokens=produced), now)
        if outcome == "retried":
            self._submit(now, request_id, returning=True)

    def _give_up(self, now, request_id):
        produced = 0
        if request_id in self.under_way:
            self.unwanted.add(request_id)
            return
        if request_id in self.running:
            produced = self._free(now, request_id)
        elif request_id in self.waiting:
            self.waiting.remove(request_id)
        else:
            return  # it has ended
        self._fill(now)
        self._at(now + HOP_S, self._tell_end, request_id, "retried", produced)

    def _report(self, now):
        here = {i: int((now - since) * TOKENS_PER_S) for i, (since, _) in self.running.items()}
        here |= dict.fromkeys(self.waiting, 0)
        report = ReplicaReport(
            replica_id="a",
            max_sequences=SLOTS,
            kv_tokens=10**9,
            running=list(here),
            produced_tokens=list(here.values()),
            start_up_s=1.0,
        )
        self._take(self.queue.report(report, now), now)
        self._take(self.queue.sweep(now), now)
        self._at(now + 0.5, self._report)


def test_batch_fills_what_is_left_and_costs_the_others_nothing():
    for load in (0.5, 0.8):
        alone, beside = Pool(load=load, batch=False), Pool(load=load, batch=True)
        assert beside.batch_share_of_what_is_left() >= 0.95
        assert beside.p99_ttft_s() <= 1.05 * alone.p99_ttft_s()


def test_without_giving_slots_up_everyone_would_wait_for_batch():
    alone, beside = Pool(load=0.8, batch=False), Pool(load=0.8, batch=True, preempt=False)
    assert beside.p99_ttft_s() > 2 * alone.p99_ttft_s()
