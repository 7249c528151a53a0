"""Counts what a replica does, for `LoadSnapshot`: arrivals, and the work of one request.

Pure: the clock is an argument, in monotonic seconds. `Embedder` and `Retriever` keep one each and return its
snapshot from `record_autoscaling_stats`.
"""

from __future__ import annotations

from collections import deque

from actors.policies.load import LoadSnapshot

_WINDOW_S = 10.0  # arrivals are counted over this
_LATEST = 0.1  # weight of the latest request in the mean work


class LoadMeter:
    """The load of one replica.

    Args:
        concurrency: requests that a replica can run at once without making each other slower.
    """

    def __init__(self, concurrency: float) -> None:
        self._concurrency = concurrency
        self._arrivals: deque[tuple[float, int]] = deque()  # when, how many
        self._work_s = 0.0  # mean work of one request; 0: not measured yet

    def arrived(self, now: float, count: int = 1) -> None:
        """Requests came, whatever becomes of them."""
        self._arrivals.append((now, count))

    def finished(self, work_s: float) -> None:
        """A request is done.

        Args:
            work_s: seconds of one full replica that it took.
        """
        self._work_s = work_s if self._work_s == 0 else self._work_s + _LATEST * (work_s - self._work_s)

    def snapshot(
        self,
        now: float,
        *,
        queued: int = 0,
        running: int = 0,
        queued_work_s: float = 0.0,
        oldest_age_s: float = 0.0,
    ) -> LoadSnapshot:
        """The load now.

        Args:
            now: the clock.
            queued: requests that wait.
            running: requests that run.
            queued_work_s: seconds of work that wait.
            oldest_age_s: longest wait.
        """
        while self._arrivals and self._arrivals[0][0] < now - _WINDOW_S:
            self._arrivals.popleft()
        return LoadSnapshot(
            queued=queued,
            running=running,
            queued_work_s=queued_work_s,
            running_work_s=running * self._work_s,
            arrival_rate_rps=sum(count for _, count in self._arrivals) / _WINDOW_S,
            work_per_request_s=self._work_s,
            oldest_age_s=max(0.0, oldest_age_s),
            replica_concurrency=self._concurrency,
        )
