"""The Serve hook, inside Serve's own wrapper: Ray 2.60's application-level policies, contexts and pickling.

These are alpha parts of Ray: an upgrade that changes them fails here first.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import ray
from ray.serve._private.common import DeploymentID, ReplicaID, TimeStampedValue
from ray.serve.autoscaling_policy import _apply_app_level_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from actors.policies.load import LoadSnapshot
from app import scaling
from app.scaling import QueuePolicy

BUSY = LoadSnapshot(
    queued=0.0,
    running=30.0,
    running_work_s=3.0,
    work_per_request_s=0.1,
    replica_concurrency=10.0,
    start_up_s=2.0,
)
IDLE = LoadSnapshot(work_per_request_s=0.1, replica_concurrency=10.0, start_up_s=2.0)
Records = dict[str, tuple[float, dict[str, float]]]  # replica → (when, stats)


def context(
    name: str,
    *,
    now: float,
    records: Records | None = None,
    replicas: int = 0,
    bounds: tuple[int, int] = (0, 8),
    state: dict[str, Any] | None = None,
) -> AutoscalingContext:
    """What Serve's controller hands to a policy; custom metrics come by metric, then by replica."""
    deployment = DeploymentID(name=name, app_name="m1")
    raw: dict[str, dict[ReplicaID, list[TimeStampedValue]]] = {}
    for replica, (at, stats) in (records or {}).items():
        for metric, value in {"running_requests": 0.0, **stats}.items():
            series = [TimeStampedValue(at - 1.0, -1.0), TimeStampedValue(at, value)]
            raw.setdefault(metric, {})[ReplicaID(replica, deployment)] = series
    return AutoscalingContext(
        deployment_id=deployment,
        deployment_name=name,
        app_name="m1",
        current_num_replicas=replicas,
        target_num_replicas=replicas,
        running_replicas=[],
        total_num_requests=0.0,
        total_queued_requests=0.0,
        aggregated_metrics=None,
        raw_metrics=lambda: raw,
        capacity_adjusted_min_replicas=bounds[0],
        capacity_adjusted_max_replicas=bounds[1],
        policy_state=state or {},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=now,
        config=AutoscalingConfig(
            min_replicas=bounds[0], max_replicas=bounds[1], upscale_delay_s=0, downscale_delay_s=0
        ),
    )


class Controller:
    """Calls a policy as Serve does: through the wrapper, with the state that came back last time."""

    def __init__(self, policy: QueuePolicy) -> None:
        self._policy = _apply_app_level_autoscaling_config(policy)
        self._states: dict[DeploymentID, dict[str, Any]] = {}
        self.targets: dict[str, int] = {}

    def tick(self, now: float, bounds: tuple[int, int] = (0, 8), **records: Records | None) -> dict[str, int]:
        contexts = {}
        for name, recorded in records.items():
            deployment = DeploymentID(name=name, app_name="m1")
            contexts[deployment] = context(
                name,
                now=now,
                records=recorded,
                replicas=self.targets.get(name, 0),
                bounds=bounds,
                state=self._states.get(deployment),
            )
        decisions, self._states = self._policy(contexts)
        named = {deployment.name: replicas for deployment, replicas in decisions.items()}
        self.targets |= named
        return named


def recorded(snapshot: LoadSnapshot, at: float) -> Records:
    return {"replica-1": (at, snapshot.to_stats())}


def test_llm_replicas_follow_the_record_of_the_batching_queue():
    controller = Controller(QueuePolicy())
    decisions = controller.tick(100.0, BatchingQueue=recorded(BUSY, 7.0), LLMReplica=None)
    assert decisions == {"LLMReplica": 3}


def test_the_queue_itself_is_never_scaled():
    controller = Controller(QueuePolicy())
    for now in range(100, 110):
        decisions = controller.tick(float(now), BatchingQueue=recorded(BUSY, float(now)), LLMReplica=None)
        assert "BatchingQueue" not in decisions


def test_a_request_that_waits_brings_a_replica_back_from_zero():
    controller = Controller(QueuePolicy())
    assert controller.tick(100.0, BatchingQueue=recorded(IDLE, 1.0), LLMReplica=None) == {"LLMReplica": 0}
    one = LoadSnapshot(queued=1.0, queued_work_s=0.1, work_per_request_s=0.1)
    assert controller.tick(100.1, BatchingQueue=recorded(one, 1.1), LLMReplica=None) == {"LLMReplica": 1}


def test_settings_reach_the_deployment_they_name_and_state_is_kept_between_ticks():
    controller = Controller(QueuePolicy(LLMReplica={"hold_s": 10.0, "to_zero_s": 30.0}))
    controller.tick(0.0, BatchingQueue=recorded(BUSY, 0.0), LLMReplica=None)
    seen = [
        controller.tick(float(now), BatchingQueue=recorded(IDLE, float(now)), LLMReplica=None)["LLMReplica"]
        for now in range(1, 80)
    ]
    assert seen[5] == 3
    assert sorted(seen, reverse=True) == seen
    assert 0 in seen
    assert seen.index(0) == 29  # at 30 s


def test_a_policy_without_memory_holds_what_it_finds():
    controller = Controller(QueuePolicy())
    controller.targets["LLMReplica"] = 5
    assert controller.tick(0.0, BatchingQueue=recorded(IDLE, 0.0), LLMReplica=None) == {"LLMReplica": 5}


def test_pools_of_the_retrieval_application_follow_their_own_replicas_together():
    half = LoadSnapshot(running=15.0, running_work_s=1.5, work_per_request_s=0.1, replica_concurrency=10.0)
    two = {"a": (1.0, half.to_stats()), "b": (2.0, half.to_stats())}
    assert Controller(QueuePolicy()).tick(5.0, Embedder=two) == {"Embedder": 3}


def test_the_one_backlog_of_job_runners_is_counted_once():
    jobs = LoadSnapshot(queued=40.0, queued_work_s=400.0, work_per_request_s=10.0, replica_concurrency=2.0)
    three = {name: (1.0, jobs.to_stats()) for name in "abc"}
    once = Controller(QueuePolicy()).tick(5.0, bounds=(0, 1000), JobRunner={"a": (1.0, jobs.to_stats())})
    assert Controller(QueuePolicy()).tick(5.0, bounds=(0, 1000), JobRunner=three) == once
    assert Controller(QueuePolicy()).tick(5.0, bounds=(0, 1000), Embedder=three) != once


def test_without_records_the_targets_stay():
    controller = Controller(QueuePolicy())
    assert controller.tick(0.0, BatchingQueue=None, LLMReplica=None) == {}
    assert controller.tick(0.0, LLMReplica=None) == {}
    assert controller.tick(0.0, Gateway={"replica-1": (1.0, {"open_streams": 3.0})}) == {}


def test_records_that_no_longer_change_decide_nothing_and_lose_no_memory():
    controller = Controller(QueuePolicy())
    assert controller.tick(0.0, BatchingQueue=recorded(BUSY, 1.0), LLMReplica=None) == {"LLMReplica": 3}
    assert controller.tick(29.0, BatchingQueue=recorded(BUSY, 1.0), LLMReplica=None) == {"LLMReplica": 3}
    assert controller.tick(31.0, BatchingQueue=recorded(BUSY, 1.0), LLMReplica=None) == {}
    assert controller.tick(32.0, BatchingQueue=recorded(IDLE, 2.0), LLMReplica=None) == {"LLMReplica": 3}


@pytest.mark.parametrize(
    ("policy", "stats"),
    [
        (QueuePolicy(), {**BUSY.to_stats(), "queued": float("nan")}),
        (QueuePolicy(), {"queued_work_s": 1.0}),
        (QueuePolicy(LLMReplica={"hold_seconds": 3.0}), BUSY.to_stats()),
        (QueuePolicy(LLMReplica={"slack_s": "soon"}), BUSY.to_stats()),
        (QueuePolicy(LLMReplica=7), BUSY.to_stats()),  # type: ignore[arg-type]
    ],
)
def test_nonsense_is_logged_now_and_then_and_never_raised(policy, stats, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(scaling._log, "exception", lambda line, *_: lines.append(line))
    controller = Controller(policy)
    for tick in range(400):
        now = tick / 10
        records = {"BatchingQueue": {"replica-1": (now, stats)}, "LLMReplica": None}
        assert controller.tick(now, **records) == {}
    assert [line.split()[0] for line in lines] == ["scaling_failed"] * 2  # at 0 s and at 30 s


def test_serve_pickles_the_policy_by_value_and_hands_it_its_settings():
    # What the build task and the controller do with `autoscaling_policy` of a config file.
    config = {"policy_function": "app.scaling:QueuePolicy", "policy_kwargs": {"LLMReplica": {"hold_s": 1.0}}}
    shipped = AutoscalingPolicy(**config).get_serialized_policy_def()
    policy = AutoscalingPolicy(_serialized_policy_def=shipped, **config)
    controller = Controller(policy.get_policy()(**policy.policy_kwargs))
    records = {"BatchingQueue": recorded(BUSY, 1.0), "LLMReplica": None}
    assert controller.tick(0.0, **records) == {"LLMReplica": 3}
    assert ray.__version__ == "2.60.0"


def test_the_hook_imports_nothing_heavy():
    heavy = "{'ray', 'torch', 'vllm', 'fastapi', 'pydantic', 'starlette', 'redis', 'chromadb', 'asyncio'}"
    script = f"import sys, app.scaling; print(sorted({heavy} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"
