"""What a queue learns from requests that ended: pace, burn, and how many a full replica runs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.policies.burn import Burn
from actors.policies.credit import Held
from actors.policies.pace import Pace
from actors.policies.service_record import ServiceRecord
from actors.types import Grant, Principal, Ticket


def held(*, waited_s: float = 0.0, produced: int = 10, prompt: int = 100) -> Held:
    ticket = Ticket(
        request_id="r",
        principal=Principal(tenant="t"),
        prompt_tokens=prompt,
        predicted_output_tokens=produced,
        timeout_s=60.0,
    )
    grant = Grant(request_id="r", replica_id="a", waited_s=waited_s, attempt=1)
    return Held(ticket=ticket, gateway_id="g", granted_at=0.0, grant=grant, produced=produced)


def test_the_pace_of_a_full_replica_is_read_off_the_line():
    pace = Pace()
    for n in range(2000):
        load = 0.2 + 0.3 * (n % 10) / 10
        pace.observe(service_s=20 * (0.01 + 0.02 * load), tokens=20, load=load)
    mean = 0.01 + 0.02 * 0.335
    assert pace.when_full() == pytest.approx(0.03 / mean, rel=0.03)


def test_without_a_slope_or_without_anything_seen_nothing_is_slower():
    pace = Pace()
    assert pace.when_full() == 1.0
    for n in range(100):
        pace.observe(service_s=2.0 - 0.5 * (n % 2), tokens=10, load=0.1 + 0.5 * (n % 2))
    assert pace.when_full() == 1.0
    pace.observe(service_s=1.0, tokens=0, load=0.5)


@given(
    seen=st.lists(st.tuples(st.floats(0.001, 100.0), st.integers(1, 5000), st.floats(0.0, 1.0)), max_size=50)
)
def test_a_full_replica_is_never_said_to_be_faster_and_never_slower_without_bound(seen):
    pace = Pace()
    for service_s, tokens, load in seen:
        pace.observe(service_s=service_s, tokens=tokens, load=load)
    assert 1.0 <= pace.when_full() <= 4.0


def test_the_burn_is_the_share_of_late_requests_of_the_last_minute():
    burn = Burn()
    assert burn.share() == 0.0
    for second in range(600):
        burn.add(10.0, 1.0, float(second))
    assert burn.share() == pytest.approx(0.1)
    for second in range(600, 900):
        burn.add(10.0, 0.0, float(second))
    assert burn.share() < 0.002


@pytest.mark.parametrize(("waited_s", "took_s", "late"), [(0.5, 1.0, 0.0), (2.5, 1.0, 1.0), (0.5, 3.0, 1.0)])
def test_a_request_that_waited_or_crawled_beyond_its_slo_is_late(waited_s, took_s, late):
    record = ServiceRecord(ttft_slo_s=2.0, tpot_slo_s=0.2)
    record.answered(held(waited_s=waited_s), load=0.5, now=took_s)
    assert record.burn.share() == late


def test_what_was_given_up_in_line_is_late():
    record = ServiceRecord(ttft_slo_s=2.0, tpot_slo_s=0.2)
    record.missed(1.0)
    assert record.burn.share() == 1.0


def test_memory_bounds_how_many_a_replica_runs():
    record = ServiceRecord(ttft_slo_s=2.0, tpot_slo_s=0.2)
    assert record.concurrency(max_sequences=64, kv_tokens=1100) == 64.0
    record.answered(held(prompt=100, produced=10), load=0.5, now=1.0)
    assert record.concurrency(max_sequences=64, kv_tokens=1100) == pytest.approx(10.0)
    assert record.concurrency(max_sequences=8, kv_tokens=1100) == 8.0
    assert record.concurrency(max_sequences=8, kv_tokens=50) == 1.0
