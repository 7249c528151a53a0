"""Ray Serve's autoscaling hook: what the queues recorded → the pure policy → replica counts.

Runs in the Serve controller, once per application and control loop (0.1 s): it imports no Ray, torch, vllm,
FastAPI or pydantic, blocks on nothing and never raises; where it cannot decide, the current target stays.
Configuration names it as `autoscaling_policy: {policy_function: "app.scaling:QueuePolicy"}`, with
`policy_kwargs` = {deployment: fields of `ScalingConfig`}. Replica bounds come from the deployment's
`autoscaling_config`, whose delays should be 0: holding back is this policy's part. The law itself is
`actors.policies.autoscaling`.

Written for Ray 2.60, where application-level policies are new; `tests/unit/test_scaling_hook.py` runs it
inside Serve's own wrapper.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from actors.policies.autoscaling import ScalingConfig, ScalingState, decide
from actors.policies.load import LoadSnapshot, merge

if TYPE_CHECKING:
    from ray.serve._private.common import DeploymentID
    from ray.serve.config import AutoscalingContext

# A child of Serve's logger: its lines go to the controller's log.
_log = logging.getLogger("ray.serve.shoal.scaling")

# Pools that follow another deployment's record; every other one follows the records of its own replicas.
_FOLLOWS = {"LLMReplica": "BatchingQueue"}
# Replicas that all see one backlog: each records the whole of it, not its share.
_ONE_BACKLOG = frozenset({"JobRunner"})
# A record that did not change for so long says nothing about now (an overloaded controller is 25 s late).
_STALE_AFTER_S = 30.0
_COMPLAIN_EVERY_S = 30.0
_STATE = "shoal"  # our key in Serve's policy state, beside Serve's own


class QueuePolicy:
    """An application-level autoscaling policy for Serve.

    Args:
        settings: by deployment name, fields of `ScalingConfig` that differ from its defaults.
    """

    def __init__(self, **settings: Mapping[str, Any]) -> None:
        self._settings = settings

    def __call__(
        self, contexts: Mapping[DeploymentID, AutoscalingContext]
    ) -> tuple[dict[DeploymentID, int], dict[DeploymentID, dict[str, Any]]]:
        """Decide for every deployment that has fresh records; the others keep their targets."""
        decisions: dict[DeploymentID, int] = {}
        states: dict[DeploymentID, dict[str, Any]] = {}
        by_name = {deployment.name: context for deployment, context in contexts.items()}
        for deployment, context in contexts.items():
            if deployment.name in _FOLLOWS.values():
                continue
            memory = dict(context.policy_state.get(_STATE, {}))
            try:
                replicas = self._decide(context, by_name, memory)
                if replicas is not None:
                    decisions[deployment] = replicas
            except Exception:  # the controller of the whole cluster must not fall over one deployment
                _complain(deployment, memory, context.current_time)
            states[deployment] = {_STATE: memory}
        return decisions, states

    def _decide(
        self,
        context: AutoscalingContext,
        by_name: Mapping[str, AutoscalingContext],
        memory: dict[str, Any],
    ) -> int | None:
        """The replicas for one deployment; None while there is no fresh record. Updates `memory`."""
        name, now = context.deployment_name, context.current_time
        config = ScalingConfig(
            min_replicas=context.capacity_adjusted_min_replicas,
            max_replicas=context.capacity_adjusted_max_replicas,
            **self._settings.get(name, {}),
        )
        source = by_name.get(_FOLLOWS.get(name, name))
        records = _records(source) if source is not None else {}
        if not records or not _fresh(records, memory, now):
            return None
        snapshot = merge(
            [LoadSnapshot.from_stats(record) for _, record in records.values()],
            one_backlog=name in _ONE_BACKLOG,
        )
        before: ScalingState = memory.get("state") or ScalingState.start(context.target_num_replicas, now)
        replicas, after = decide(before, snapshot, config, now)
        memory["state"] = after
        if replicas != before.replicas:
            _log.info(
                "replicas_decided application=%s deployment=%s from=%d to=%d needs=%s load=%s",
                context.app_name, name, before.replicas, replicas, after.needs, snapshot,
            )  # fmt: skip
        return replicas


def _records(source: AutoscalingContext) -> dict[str, tuple[float, dict[str, float]]]:
    """By replica: when it last recorded (its own clock) and the newest value of every series."""
    records: dict[str, tuple[float, dict[str, float]]] = {}
    for metric, by_replica in (source.raw_metrics or {}).items():
        for replica, series in by_replica.items():
            if series:
                at, record = records.setdefault(str(replica), (0.0, {}))
                record[metric] = series[-1].value
                records[str(replica)] = (max(at, series[-1].timestamp), record)
    # A replica that has started and recorded nothing of ours yet only has Serve's own series.
    return {replica: (at, record) for replica, (at, record) in records.items() if "queued_work_s" in record}


def _fresh(records: Mapping[str, tuple[float, dict[str, float]]], memory: dict[str, Any], now: float) -> bool:
    """Did any record change within `_STALE_AFTER_S`? Clocks of different machines are never compared."""
    newest = max(at for at, _ in records.values())
    if newest != memory.get("newest"):
        memory.update(newest=newest, changed_at=now)
    return bool(now - memory["changed_at"] <= _STALE_AFTER_S)


def _complain(deployment: DeploymentID, memory: dict[str, Any], now: float) -> None:
    """Log the current exception, now and then: this runs ten times a second."""
    if now - memory.get("complained_at", float("-inf")) >= _COMPLAIN_EVERY_S:
        memory["complained_at"] = now
        _log.exception("scaling_failed deployment=%s: its replicas stay as they are", deployment)
