"""The simulator's pool: its events against a naive engine that takes every step, and its replicas' lives."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.engines.service_curve import ServiceCurve
from actors.errors import InvalidRequest
from app.simulate.oracle import lower_bound_s
from app.simulate.policies import Static
from app.simulate.pool import Pool
from app.simulate.run import Bounds, simulate
from app.simulate.tables import LIVE_S, Model
from app.simulate.trace import Trace

MODEL = Model(max_sequences=3, kv_tokens=400, start_up_s=10.0, timeout_s=1e6)


def trace(requests: list[tuple[float, int, int]], tenants: list[int] | None = None) -> Trace:
    """Requests as (arrival, prompt, output)."""
    arrive, prompt, output = zip(*requests, strict=True)
    tenant = tenants or [0] * len(requests)
    return Trace(
        name="t",
        arrive_s=np.array(arrive, float),
        prompt_tokens=np.array(prompt),
        output_tokens=np.array(output),
        tenant=np.array(tenant),
        tenants=max(tenant) + 1,
        duration_s=max(arrive) + 1.0,
    )


def pool(of: Trace, model: Model = MODEL, replicas: int = 1) -> Pool:
    return Pool(of, model, max_replicas=8, first_replicas=replicas)


def naive(of: Trace, m: Model) -> tuple[list[float], list[float]]:
    """One replica, step by step, as `scripted_loop` does it: first tokens and ends."""
    n = len(of)
    first, done, left = [math.nan] * n, [math.nan] * n, {}
    waiting, now, upcoming = [], 0.0, 0

    def arrived() -> None:
        nonlocal upcoming
        while upcoming < n and of.arrive_s[upcoming] <= now + 1e-9:
            waiting.append(upcoming)
            upcoming += 1

    while len([d for d in done if not math.isnan(d)]) < n:
        arrived()
        if not left and not waiting:
            now = of.arrive_s[upcoming]
            arrived()
        prefill = 0
        while waiting and len(left) < m.max_sequences:
            i = waiting[0]
            held = sum(of.prompt_tokens[k] + of.output_tokens[k] for k in left)
            if left and held + of.prompt_tokens[i] + of.output_tokens[i] > m.kv_tokens:
                break
            waiting.pop(0)
            left[i] = of.output_tokens[i]
            prefill += of.prompt_tokens[i]
        now += m.itl_base_s + m.itl_per_sequence_s * len(left) + prefill / m.prefill_tokens_per_s
        for i in list(left):
            if math.isnan(first[i]):
                first[i] = now
            left[i] -= 1
            if left[i] == 0:
                done[i] = now
                del left[i]
    return first, done


def test_a_request_alone_takes_what_the_curve_says():
    alone = pool(trace([(1.0, 100, 20)]))
    alone.advance(100.0)
    curve = ServiceCurve()
    assert alone.t.first[0] == pytest.approx(1.0 + curve.step_s(1, 100))
    assert alone.t.done[0] == pytest.approx(1.0 + curve.request_s(100, 20, 1))


requests = st.lists(
    st.tuples(st.integers(0, 2000).map(lambda ms: ms / 1e3 + 1e-5), st.integers(1, 200), st.integers(1, 60)),
    min_size=1,
    max_size=25,
).map(sorted)


@settings(max_examples=60, deadline=None)
@given(requests=requests)
def test_jumping_over_steps_gives_the_times_of_taking_each_one(requests):
    of = trace(requests)
    jumped = pool(of)
    jumped.advance(1e4)
    first, done = naive(of, MODEL)
    assert jumped.t.first == pytest.approx(first)
    assert jumped.t.done == pytest.approx(done)


@settings(max_examples=30, deadline=None)
@given(requests=requests, replicas=st.integers(1, 4))
def test_every_request_ends_and_nothing_is_left_behind(requests, replicas):
    of = trace(requests)
    used = pool(of, replicas=replicas)
    used.advance(1e4)
    assert not np.isnan(used.t.done).any()
    assert (used.queued, used.running) == (0, 0)
    assert used.t.held_tokens.sum() == used.t.batch_tokens.sum() == 0
    assert (used.t.granted >= of.arrive_s).all()


@settings(max_examples=30, deadline=None)
@given(requests=requests, replicas=st.integers(1, 4))
def test_no_run_costs_less_than_the_proved_bound(requests, replicas):
    of = trace(requests)
    used = pool(of, MODEL._replace(ttft_slo_s=1e3, tpot_slo_s=1e3), replicas)
    used.advance(float(of.arrive_s[0]))
    end = float(np.ceil(1e4))
    used.advance(end)
    busy_end = float(np.nanmax(used.t.done))
    bound = lower_bound_s(
        of, MODEL._replace(ttft_slo_s=0, tpot_slo_s=0), attainment=1.0, begin_s=0.0, end_s=end
    )
    assert bound <= busy_end * replicas + 1e-6


def test_tenants_take_turns_while_they_all_wait():
    many = [(0.0, 10, 50)] * 12 + [(0.01, 10, 50)] * 3
    shared = pool(trace(many, [0] * 12 + [1] * 3), MODEL._replace(max_sequences=1, look_ahead=0))
    shared.advance(1e4)
    # The second tenant came behind twelve; its three are through when the first has had about as many.
    assert np.sum(shared.t.granted[:12] < shared.t.granted[14]) <= 5


def test_who_waited_too_long_is_given_up_and_counts_as_late():
    model = MODEL._replace(max_sequences=1, look_ahead=0, timeout_s=0.2)
    crowded = pool(trace([(0.0, 1, 100), (0.0, 1, 100), (0.0, 1, 100)]), model)
    crowded.advance(1e3)
    assert np.isnan(crowded.t.done).sum() == 2


def test_a_replica_costs_from_its_order_and_serves_from_its_start():
    growing = pool(trace([(0.0, 1, 1000), (0.0, 1, 1000)]), MODEL._replace(max_sequences=1, look_ahead=0))
    growing.advance(1.0)
    growing.scale_to(2)
    growing.advance(5.0)
    assert (growing.ready, growing.live, growing.queued) == (1, 2, 1)
    growing.advance(12.0)
    assert (growing.ready, growing.queued) == (2, 0)
    assert growing.t.granted[1] == pytest.approx(min(11.0, growing.t.done[0]))
    assert growing.t.sums[LIVE_S] == pytest.approx(12.0 + 11.0)


def test_a_draining_replica_finishes_what_it_runs_and_takes_nothing_new():
    shrinking = pool(trace([(0.0, 1, 1000), (0.1, 1, 1000), (1.0, 1, 10)]), replicas=2)
    shrinking.advance(0.5)
    shrinking.scale_to(1)
    assert (shrinking.target, shrinking.live) == (1, 2)
    shrinking.advance(3.0)
    assert shrinking.ready == 1
    shrinking.advance(100.0)
    assert shrinking.live == 1
    assert not np.isnan(shrinking.t.done).any()


def test_what_still_starts_is_stopped_first_and_at_once():
    undecided = pool(trace([(0.0, 1, 10)]))
    undecided.scale_to(3)
    undecided.advance(1.0)
    undecided.scale_to(1)
    assert (undecided.live, undecided.ready) == (1, 1)


def test_the_snapshot_counts_work_at_the_pace_of_a_full_replica():
    # A steady load on four replicas that two could carry: none is full, and all are faster for it.
    rng = np.random.default_rng(0)
    arrive = np.cumsum(rng.exponential(0.025, 4000))
    steep = Model(max_sequences=16, itl_base_s=0.002, itl_per_sequence_s=0.002)
    of = trace([(float(at), 10, 20) for at in arrive])
    easy = pool(of, steep, replicas=4)
    easy.advance(float(arrive[-1]))
    full_s = 10 / steep.prefill_tokens_per_s + 20 * (steep.itl_base_s / 16 + steep.itl_per_sequence_s)
    measured = easy.t.sums[3] / 16
    # How full a replica is as a request ends says only in part how full it was before, so the line is a little flat.
    assert 1.2 * measured < easy.snapshot().work_per_request_s < 1.1 * full_s


def test_a_run_reports_what_its_policy_cost():
    of = trace([(float(at), 10, 10) for at in range(100)])
    result = simulate(of, MODEL, Static(2), Bounds(first_replicas=2))
    assert result.attainment == 1.0
    assert result.mean_replicas == pytest.approx(2.0)
    assert result.reversals_per_h == 0.0


def test_an_empty_trace_is_refused():
    with pytest.raises(InvalidRequest, match="no requests"):
        Trace(name="x", arrive_s=np.array([]), prompt_tokens=[], output_tokens=[], tenant=[])
