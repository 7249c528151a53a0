"""What the resume benchmark says of a kill."""

import pytest

from tests.benchmarks.open_loop import Answer
from tests.benchmarks.resume import judged
from tests.benchmarks.session_log import _time_of


def stream(*token_times, outcome="ok"):
    return Answer(
        label="", tokens=len(token_times), due_at=0.0, sent_at=0.0, ended_at=9.0, outcome=outcome, status=200,
        detail="", attempt=1, token_times=list(token_times),
    )  # fmt: skip


def test_the_gap_is_from_the_detection_to_the_last_first_token():
    moved, later, untouched = stream(1.0, 1.2, 1.8, 2.0), stream(1.1, 1.9, 2.0), stream(1.0, 1.2, 1.4, 1.6)
    found = judged([moved, later, untouched], killed_at=1.3, seen_at=[1.45, 1.5])
    assert found.completed == 1.0
    assert found.detection_s == pytest.approx(0.2)
    assert found.gap_s == pytest.approx(0.4)
    assert found.longest_pause_s == pytest.approx(0.8)
    assert found.moved == 2


def test_a_pause_before_the_kill_does_not_count():
    found = judged([stream(1.0, 5.0, 5.1, 5.2)], killed_at=5.05)
    assert found.longest_pause_s == pytest.approx(0.1)


def test_a_stream_that_was_cut_is_not_complete():
    found = judged([stream(1.0, 1.1), stream(1.0, 1.1, outcome="conn_error")], killed_at=1.2)
    assert found.completed == 0.5
    assert found.longest_pause_s == 0.0


def test_only_our_own_lines_with_the_action_have_a_time():
    line = '{"reason": "x", "timestamp": "2026-01-01T00:00:01.5Z", "action": "attempt_failed"}\n'
    assert _time_of(line, "attempt_failed") == 1767225601.5
    assert _time_of(line, "other") is None
    assert _time_of("attempt_failed {", "attempt_failed") is None
    assert _time_of(line[:40] + "attempt_failed", "attempt_failed") is None
