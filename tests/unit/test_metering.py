"""The measured load of one replica."""

import pytest

from actors.policies.load import LoadSnapshot
from actors.policies.metering import LoadMeter


def test_arrivals_are_counted_over_the_last_ten_seconds():
    meter = LoadMeter(4)
    meter.arrived(0.0)
    meter.arrived(5.0, 9)
    assert meter.snapshot(6.0).arrival_rate_rps == pytest.approx(1.0)
    assert meter.snapshot(12.0).arrival_rate_rps == pytest.approx(0.9)
    assert meter.snapshot(30.0).arrival_rate_rps == 0


def test_what_runs_is_worth_the_mean_work_of_a_request():
    meter = LoadMeter(4)
    assert meter.snapshot(0.0, running=3).running_work_s == 0
    meter.finished(0.2)
    assert meter.snapshot(0.0, running=3).running_work_s == pytest.approx(0.6)
    meter.finished(1.2)
    assert meter.snapshot(0.0).work_per_request_s == pytest.approx(0.3)


def test_a_snapshot_is_what_the_scaling_policy_reads():
    meter = LoadMeter(4)
    stats = meter.snapshot(0.0, queued=2, running=1, queued_work_s=0.5, oldest_age_s=-1e-9).to_stats()
    again = LoadSnapshot.from_stats(stats)
    assert (again.queued, again.running, again.queued_work_s, again.oldest_age_s) == (2, 1, 0.5, 0)
    assert again.replica_concurrency == 4
