"""Virtual token counters: whose turn it is among those who wait.

Pure. The rule of VTC (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024): the one that has been
served least goes first, and one that comes back is lifted to the least of those who wait, so nobody saves up turns
while idle. A service may be charged before it is known and put right later. Used by `actors.policies.class_line`, which
knows what a service costs.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

_SPARE_ENTRIES = 64  # of those who wait no longer; fewer are not worth a sweep


@dataclass(slots=True)
class _Account:
    key: str
    counter: float = 0.0  # service over weight
    waiting: bool = False
    entry: int = -1  # number of its entry in the heap; older ones of it are void


class VirtualCounters:
    """Service that each key has had, over its weight; the least served of those who wait is next.

    While counters rise, an entry in the heap is a lower bound and is put right when it comes to the top: a charge
    costs O(1), a turn O(log n) amortised. One that falls is entered anew, in O(log n).

    Args:
        weights: share of each key against the others'; 1 for those not named.
        most_idle: counters kept of keys that do not wait, by last use. One that is forgotten comes back as a new one.
    """

    def __init__(self, weights: Mapping[str, float] | None = None, most_idle: int = 10_000) -> None:
        self._weights = weights or {}
        self._most_idle = most_idle
        self._waiting: dict[str, _Account] = {}
        self._idle: OrderedDict[str, _Account] = OrderedDict()
        self._last_left: _Account | None = None
        self._heap: list[tuple[float, int, _Account]] = []
        self._sequence = itertools.count()  # among equals the one that came first

    def weight(self, key: str) -> float:
        """Its share against the others'."""
        return self._weights.get(key, 1.0)

    def counter(self, key: str) -> float:
        """Service over weight, lifts included; 0 for one that was never seen or is forgotten."""
        account = self._waiting.get(key) or self._idle.get(key)
        return account.counter if account is not None else 0.0

    def join(self, key: str, credit: float = 0.0) -> None:
        """It begins to wait: its counter is lifted to the least of those who do, or to the last one's that left.

        Args:
            key: who it is.
            credit: it may stay so far below, in service over weight: it was not idle.
        """
        if key in self._waiting:
            return
        account = self._idle.pop(key, None) or _Account(key)
        lowest = self._first() or self._last_left
        if lowest is not None:
            account.counter = max(account.counter, lowest.counter - credit)
        account.waiting = True
        self._waiting[key] = account
        self._list(account)

    def leave(self, key: str) -> None:
        """It waits no longer."""
        account = self._waiting.pop(key)
        account.waiting = False
        account.entry = -1
        self._last_left = account
        self._keep_idle(account)
        self._tidy()

    def charge(self, key: str, service: float) -> None:
        """It was served: `service` in tokens, weighted by kind; below 0 what it was charged too much."""
        account = self._waiting.get(key)
        if account is None:
            account = self._idle.pop(key, None) or _Account(key)
            self._keep_idle(account)
        account.counter += service / self.weight(key)
        if service < 0.0 and account.waiting:
            self._list(account)
            self._tidy()

    def next(self) -> str | None:
        """Who waits and has been served least."""
        account = self._first()
        return account.key if account is not None else None

    def _first(self) -> _Account | None:
        while self._heap:
            listed_at, entry, account = self._heap[0]
            if entry != account.entry:
                heapq.heappop(self._heap)
            elif account.counter > listed_at:
                account.entry = next(self._sequence)
                heapq.heapreplace(self._heap, (account.counter, account.entry, account))
            else:
                return account
        return None

    def _list(self, account: _Account) -> None:
        account.entry = next(self._sequence)
        heapq.heappush(self._heap, (account.counter, account.entry, account))

    def _keep_idle(self, account: _Account) -> None:
        self._idle[account.key] = account
        if len(self._idle) > self._most_idle:
            self._idle.popitem(last=False)

    def _tidy(self) -> None:
        """Forget void entries: while the first is blocked, they never come to the top."""
        if len(self._heap) > _SPARE_ENTRIES + 2 * len(self._waiting):
            self._heap = [entry for entry in self._heap if entry[1] == entry[2].entry]
            heapq.heapify(self._heap)
