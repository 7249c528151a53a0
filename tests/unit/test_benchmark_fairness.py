"""What the fairness benchmark says of two tenants that both wait."""

import pytest

from tests.benchmarks.fairness import BURSTY, VICTIM, backlog, bound, gap, tokens_per_s
from tests.benchmarks.open_loop import Answer
from tests.benchmarks.paced_pool import TOKENS_PER_S


def answer(label, *token_times, due_at=0.0):
    return Answer(
        label=label, tokens=len(token_times), due_at=due_at, sent_at=due_at, ended_at=token_times[-1], outcome="ok",
        status=200, detail="", attempt=1, token_times=list(token_times),
    )  # fmt: skip


def test_service_in_turn_has_a_small_gap():
    answers = [answer(VICTIM, 1.0, 3.0, 5.0), answer(BURSTY, 2.0, 4.0, 6.0)]
    # Until the first of the two has begun its last request, at 1 s, the victim got its prompt and a token.
    assert gap(answers) == 3 + 2


def test_service_of_one_alone_while_both_wait_is_a_gap():
    first = [answer(BURSTY, at, at + 0.5) for at in (1.0, 2.0, 3.0)]
    assert gap([*first, answer(VICTIM, 10.0)]) == pytest.approx(2 * (2 + 2 * 2) + 2 + 2)


def test_service_before_both_wait_does_not_count():
    assert gap([answer(BURSTY, 1.0, 2.0), answer(BURSTY, 6.0), answer(VICTIM, 7.0, due_at=5.0)]) == 1 + 2


def test_the_backlog_has_as_many_tokens_of_each_and_takes_as_long_as_asked():
    arrivals = backlog({VICTIM: {}, BURSTY: {}}, 10.0)
    tokens = {label: sum(one.tokens for one in arrivals if one.label == label) for label in (VICTIM, BURSTY)}
    assert tokens[VICTIM] == pytest.approx(tokens[BURSTY], rel=0.01)
    assert sum(tokens.values()) == pytest.approx(10 * TOKENS_PER_S, rel=0.01)
    assert sum(tokens.values()) > 2 * bound() / 3  # an unfair order shows


def test_throughput_is_from_the_first_request_to_the_last_token():
    assert tokens_per_s([answer(VICTIM, 1.0, 2.0), answer(BURSTY, 3.0, 4.0)]) == 1.0
