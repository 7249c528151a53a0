"""What goes into the dispatcher and what comes out of it.

Pure values of `actors.policies.dispatch`; `actors.batching_queue` and the handles carry them to gateways and
replicas.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from actors.errors import ShoalError
from actors.policies.class_shares import CLASS_WEIGHTS
from actors.types import Grant, PriorityClass

# How a ticket's life ends. "retried" ends one attempt: the request comes back with a new ticket.
Outcome = Literal["answered", "failed", "expired", "cancelled", "refused", "retried"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Granted:
    """Deliver a grant to the gateway that holds the payload."""

    gateway_id: str
    grant: Grant


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """Deliver a refusal."""

    gateway_id: str
    request_id: str
    error: ShoalError


@dataclass(frozen=True, kw_only=True, slots=True)
class Preempted:
    """Take a running request off its replica and submit it again with what it has: its slot is wanted."""

    gateway_id: str
    request_id: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Lost:
    """A replica has fallen silent: every gateway takes what runs there elsewhere."""

    replica_id: str


Decision = Granted | Refused | Preempted | Lost


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaReport:
    """What a replica says about itself twice a second; the first one registers it."""

    replica_id: str
    max_sequences: int
    kv_tokens: int
    running: Sequence[str]  # request ids
    produced_tokens: Sequence[int] = ()  # output of each running request since it began there
    start_up_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class DispatchSettings:
    """Bounds of the queue."""

    look_ahead: int = 1  # sequences granted beyond what a replica runs
    silent_after_s: float = 2.0  # no report for so long: no new grants, and given up where another one is
    dead_after_s: float = 15.0  # no report for so long: given up, even the only one
    banned_s: float = 5.0  # reports of a replica that was given up are ignored so long
    draining_s: float = (
        30.0  # a replica that has left a router gets nothing new so long; then it is tried again
    )
    max_waiting: int = 100_000  # tickets; the memory bound
    expected_start_up_s: float = 10.0  # until a start-up was measured
    ttft_slo_s: float = 2.0  # a wait that is longer is late: the autoscaler's headroom follows it
    tpot_slo_s: float = 0.2  # seconds per token beyond which an answer is late
    preempt_batch: bool = True  # batch gives its place up when a higher class finds none
    preempt_tenants: bool = True  # a tenant over its share gives places up when another one finds none
    class_weights: Mapping[PriorityClass, float] = field(default_factory=lambda: dict(CLASS_WEIGHTS))
    tenant_weights: Mapping[str, float] = field(default_factory=dict)  # 1 for those not named

    def __post_init__(self) -> None:
        """Refuse weights that are none: a zero would divide, a negative one turn the order round."""
        for name, weight in [*self.class_weights.items(), *self.tenant_weights.items()]:
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(f"the weight of {name!s} must be a finite number > 0, not {weight}")
