"""Overload, simulated: what becomes of callers who come back when they were told to, and of the capacity meanwhile."""

import heapq
import itertools
import math
import random
from dataclasses import dataclass, field

import pytest

from actors.policies.decisions import DispatchSettings, Granted, Refused, ReplicaReport
from actors.policies.dispatch import Dispatcher
from actors.types import Principal, Ticket

SLOTS = 4
MEAN_S = 0.2
CAPACITY_RPS = SLOTS / MEAN_S


@dataclass
class Overload:
    """Clients that arrive at random, get a deadline of `timeout_s`, and obey Retry-After with probability `obey`."""

    load: float  # over capacity
    obey: float
    timeout_s: float = 3.0
    for_s: float = 40.0
    seed: int = 1
    whole_seconds: bool = True  # the header has no fractions
    tenants: int = 1
    answered: int = 0
    retries: int = 0
    kept: int = 0
    expired: int = 0
    busy_s: float = 0.0
    told_s: list[float] = field(default_factory=list)

    def run(self):
        self.random = random.Random(self.seed)
        self.queue = Dispatcher(
            settings=DispatchSettings(silent_after_s=1e9, dead_after_s=1e9), rng=random.Random(self.seed)
        )
        self.queue.report(
            ReplicaReport(replica_id="a", max_sequences=SLOTS, kv_tokens=10**9, running=(), start_up_s=1.0),
            0.0,
        )
        self.events = []
        self.order = itertools.count()
        self.tickets = {}
        self.running, self.ahead = 0, []
        self._at(0.0, self._arrive)
        while self.events:
            now, _, act, args = heapq.heappop(self.events)
            act(now, *args)
        assert self.queue.in_flight() == 0
        return self

    def _at(self, at_s, act, *args):
        heapq.heappush(self.events, (at_s, next(self.order), act, args))

    def _arrive(self, now):
        self._submit(now, next(self.order), attempt=1)
        pause_s = self.random.expovariate(self.load * CAPACITY_RPS)
        if now + pause_s < self.for_s:
            self._at(now + pause_s, self._arrive)

    def _submit(self, now, prompt, attempt):
        request_id = f"q{next(self.order)}"
        self.tickets[request_id] = (prompt, attempt)
        self.retries += attempt == 2
        ticket = Ticket(
            request_id=request_id,
            principal=Principal(tenant=f"t{prompt % self.tenants}"),
            prompt_tokens=10,
            predicted_output_tokens=10,
            timeout_s=self.timeout_s,
            prefix=(prompt,),
        )
        self._take(self.queue.submit(ticket, "g", now), now)

    def _take(self, decisions, now):
        for decision in decisions:
            if isinstance(decision, Granted):
                self._begin(decision.grant.request_id, now)
            elif isinstance(decision, Refused) and decision.error.code == "overloaded":
                self._refused(decision, now)

    def _refused(self, decision, now):
        prompt, attempt = self.tickets[decision.request_id]
        wait_s = decision.error.retry_after_s
        self.told_s.append(wait_s)
        if attempt == 1 and self.random.random() < self.obey:
            self._at(now + (math.ceil(wait_s) if self.whole_seconds else wait_s), self._submit, prompt, 2)

    def _begin(self, request_id, now):
        if self.running == SLOTS:
            self.ahead.append(request_id)
            return
        self.running += 1
        service_s = self.random.uniform(0.5, 1.5) * MEAN_S
        self.busy_s += min(service_s, max(self.for_s - now, 0.0))
        self._at(now + service_s, self._end, request_id)

    def _end(self, now, request_id):
        self.running -= 1
        self.answered += now <= self.for_s
        self.kept += self.tickets[request_id][1] == 2
        if self.ahead:
            self._begin(self.ahead.pop(0), now)
        self._take(self.queue.end(request_id, "answered", now), now)

    @property
    def utilisation(self):
        return self.busy_s / (SLOTS * self.for_s)

    @property
    def first_retry_succeeds(self):
        return self.kept / self.retries


@pytest.mark.parametrize("load", [2.0, 5.0])
@pytest.mark.parametrize("obey", [1.0, 0.5])
@pytest.mark.parametrize("tenants", [1, 5])
def test_nine_of_ten_who_come_back_as_told_are_let_in_at_their_first_retry(load, obey, tenants):
    overload = Overload(load=load, obey=obey, tenants=tenants, timeout_s=5.0).run()
    assert overload.retries > 100
    assert overload.first_retry_succeeds >= 0.9
    assert overload.utilisation >= 0.97


@pytest.mark.parametrize("timeout_s", [1.0, 5.0])
def test_no_slot_stays_empty_for_callers_who_never_come_back(timeout_s):
    overload = Overload(load=3.0, obey=0.0, timeout_s=timeout_s).run()
    assert overload.utilisation >= 0.97
    assert max(overload.told_s) < 25.0  # nobody is told to wait for them either
