"""What the job log holds: leases, jobs as they can be looked up, and how much is pending.

Made by `actors.stores.jobs`, read by the runner and by whoever shows jobs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

JobState = Literal["waiting", "leased", "done", "dead", "cancelled"]


class LeaseLost(Exception):
    """Somebody else owns the job, or it was cancelled: stop, and write nothing more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lease:
    """One job in the hands of one runner."""

    kind: str
    job_id: str
    tenant: str
    payload: Mapping[str, Any]
    consumer: str
    entry: str  # id in the stream
    epoch: int  # fences the runners before this one
    serial: str  # jobs of one tenant with the same value run one after another; "" for any order
    attempts: int  # this one included
    deaths: int  # runners that died with it
    failures: int  # attempts that ended in a retry
    unforeseen: int  # of them by an error that nobody foresaw
    age_s: float  # since it was enqueued


@dataclass(frozen=True, kw_only=True, slots=True)
class LeaseBatch:
    """What `lease` found; also where `wait` goes on from."""

    leases: Sequence[Lease]
    last_entry: str
    due_in_s: float | None  # until the next delayed job
    drained: bool  # nothing was left to take


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A job as it can be looked up."""

    job_id: str
    tenant: str
    state: JobState
    payload: Mapping[str, Any]
    attempts: int
    deaths: int
    error: str


@dataclass(frozen=True, kw_only=True, slots=True)
class JobStats:
    """What is not done."""

    waiting: int
    leased: int
    delayed: int
    oldest_age_s: float  # of those that no runner has

    @property
    def pending(self) -> int:
        """All of them."""
        return self.waiting + self.leased + self.delayed


def lease_of(kind: str, consumer: str, row: Sequence[Any]) -> Lease:
    """One row of jobs_lease.lua's reply."""
    job_id, entry, tenant, payload, serial, *numbers = row
    epoch, attempts, deaths, failures, unforeseen, age_ms = map(int, numbers)
    return Lease(
        kind=kind,
        job_id=job_id.decode(),
        tenant=tenant.decode(),
        payload=msgspec.msgpack.decode(payload),
        consumer=consumer,
        entry=entry.decode(),
        epoch=epoch,
        serial=serial.decode(),
        attempts=attempts,
        deaths=deaths,
        failures=failures,
        unforeseen=unforeseen,
        age_s=age_ms / 1e3,
    )


def job_of(job_id: str, fields: Mapping[bytes, bytes]) -> Job:
    """The hash of one job."""
    state: Any = fields[b"state"].decode()
    return Job(
        job_id=job_id,
        tenant=fields[b"tenant"].decode(),
        state=state,
        payload=msgspec.msgpack.decode(fields[b"payload"]),
        attempts=int(fields[b"attempts"]),
        deaths=int(fields[b"deaths"]),
        error=fields.get(b"error", b"").decode(),
    )
