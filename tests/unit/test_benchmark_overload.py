"""What the overload benchmark puts on a system, and what it calls normal."""

from collections import Counter

import pytest

from tests.benchmarks.open_loop import Answer
from tests.benchmarks.overload import PROBES_PER_S, SHARES, WITHIN_S, Callers, back_to_normal_s, in_time
from tests.benchmarks.paced_pool import STEP_S, TOKENS_PER_S


def answer(sent_at, took_s, label="interactive", outcome="ok"):
    return Answer(
        label=label, tokens=20, due_at=sent_at, sent_at=sent_at, ended_at=sent_at + took_s, outcome=outcome,
        status=200 if outcome == "ok" else 429, detail="", attempt=1, token_times=[],
    )  # fmt: skip


@pytest.mark.parametrize("factor", [2, 3, 5])
def test_the_load_is_as_many_times_the_capacity_in_the_shares_of_the_classes(factor):
    load = Callers({name: {"who": name} for name in SHARES}).load(factor, 60.0)
    assert sum(one.tokens for one in load) == pytest.approx(factor * 60 * TOKENS_PER_S, rel=0.01)
    counts = Counter(one.label for one in load)
    assert {name: counts[name] / len(load) for name in SHARES} == pytest.approx(SHARES, rel=0.01)
    assert all(one.headers == {"who": one.label} and one.timeout_s == WITHIN_S[one.label] for one in load)


def test_serve_gets_the_same_callers_with_the_same_service_times():
    ours = Callers({name: {} for name in SHARES}).load(3, 5.0)
    serve = Callers({}, "/serve").load(3, 5.0)
    assert [(one.at_s, one.tokens, one.timeout_s) for one in serve] == [
        (one.at_s, one.tokens, one.timeout_s) for one in ours
    ]
    assert all(one.path == "/serve" and one.service_s == one.tokens * STEP_S for one in serve)


def test_an_answer_behind_its_time_is_no_goodput():
    assert in_time(answer(0.0, 1.9))
    assert not in_time(answer(0.0, 2.1))
    assert not in_time(answer(0.0, 0.1, outcome="clean_error"))


def test_normal_is_when_no_later_probe_is_slow_or_refused():
    probes = [
        answer(10.0, 0.4),
        answer(11.0, 2.0),
        answer(12.0, 0.4),
        answer(13.0, 0.1, outcome="clean_error"),
    ]
    later = [answer(14.0, 0.4)]
    assert back_to_normal_s(probes + later, load_ended_at=10.0, usual_s=0.4) == pytest.approx(
        3 + 1 / PROBES_PER_S
    )
    assert back_to_normal_s(later, load_ended_at=10.0, usual_s=0.4) == 0.0
