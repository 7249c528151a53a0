"""Decisions of ingestion: what a job asks for, and what happens after a failure.

Pure: `actors.stores.catalog` makes tasks, `actors.job_runner` runs them and asks `after_failure`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from actors.errors import EngineFailed, ShoalError

KIND = "ingestion"  # the job log's name for these jobs


@dataclass(frozen=True, kw_only=True, slots=True)
class IngestionTask:
    """Make index and document store agree with the catalog; what they should hold is read when it runs.

    A task says where to look, never what to do, so that running one twice, late or in vain is harmless.
    """

    action: Literal["sync_file", "drop_store", "drop_file"]
    vector_store_id: str = ""  # for sync_file and drop_store
    file_id: str = ""  # for sync_file and drop_file
    refresh: bool = False  # write the index entries again though the version did not change (attributes did)

    @property
    def serial(self) -> str:
        """Tasks with the same value never run at the same time."""
        return f"{self.vector_store_id}:{self.file_id}"


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryPolicy:
    """How long a failing job is tried again."""

    base_s: float = 0.5  # back-off after the first failure; doubles
    most_s: float = 30.0  # longest back-off
    give_up_after_s: float = 86_400.0  # for parts that are down
    max_failures: int = 5  # for failures that nobody foresaw


def unforeseen(error: BaseException) -> bool:
    """Whether a failure may be the document's own doing, so that trying for ever would not help.

    An engine that fails on a text raises `EngineFailed`, which elsewhere means: try another replica.
    """
    return isinstance(error, EngineFailed) or not isinstance(error, ShoalError)


def after_failure(
    error: BaseException, *, failures: int, age_s: float, jitter: float, policy: RetryPolicy
) -> float | None:
    """Seconds until the job is tried again; None: never, it has failed.

    Full jitter as in "Exponential Backoff And Jitter" (AWS Architecture Blog, 2015), above a floor of a tenth
    so that a job never spins.

    Args:
        error: what ended the attempt.
        failures: attempts that failed before this one.
        age_s: since the job was enqueued.
        jitter: a random number, 0 to 1.
        policy: the bounds.
    """
    if not unforeseen(error) and isinstance(error, ShoalError):
        # Parts that are down come back: patience is bounded by time, not by tries. What is not retryable is final.
        if not error.retryable or age_s > policy.give_up_after_s:
            return None
    elif failures + 1 >= policy.max_failures:
        return None
    longest_s = min(policy.most_s, policy.base_s * 2.0 ** min(failures, 20))
    delay_s = longest_s * (0.1 + 0.9 * jitter)
    asked_s = error.retry_after_s if isinstance(error, ShoalError) else None
    return max(delay_s, asked_s or 0.0)
