"""Virtual token counters: whose turn it is among those who wait.

Pure. The rule of VTC (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024): the one that has been
served least goes first, and one that comes back is lifted to the least of those who wait, so nobody saves up turns
while idle. Used by `actors.policies.class_line`, which knows what a service costs.
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
    listed: bool = False  # has an entry in the heap


class VirtualCounters:
    """Service that each key has had, over its weight; the least served of those who wait is next.

    Counters only rise, so an entry in the heap is a lower bound and is put right when it comes to the top: a
    charge costs O(1), a turn O(log n) amortised.

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

    def join(self, key: str) -> None:
        """It begins to wait: its counter is lifted to the least of those who do, or to the last one's that left."""
        if key in self._waiting:
            return
        account = self._idle.pop(key, None) or _Account(key)
        lowest = self._first() or self._last_left
        if lowest is not None:
            account.counter = max(account.counter, lowest.counter)
        account.waiting = True
        self._waiting[key] = account
        if not account.listed:
            self._list(account)

    def leave(self, key: str) -> None:
        """It waits no longer."""
        account = self._waiting.pop(key)
        account.waiting = False
        self._last_left = account
        self._keep_idle(account)
        if len(self._heap) > _SPARE_ENTRIES + 2 * len(self._waiting):
            self._compact()

    def charge(self, key: str, service: float) -> None:
        """It was served: `service` in tokens, weighted by kind."""
        account = self._waiting.get(key)
        if account is None:
            account = self._idle.pop(key, None) or _Account(key)
            self._keep_idle(account)
        account.counter += service / self.weight(key)

    def next(self) -> str | None:
        """Who waits and has been served least."""
        account = self._first()
        return account.key if account is not None else None

    def _first(self) -> _Account | None:
        while self._heap:
            listed_at, _, account = self._heap[0]
            if not account.waiting:
                heapq.heappop(self._heap)
                account.listed = False
            elif account.counter > listed_at:
                heapq.heapreplace(self._heap, (account.counter, next(self._sequence), account))
            else:
                return account
        return None

    def _list(self, account: _Account) -> None:
        account.listed = True
        heapq.heappush(self._heap, (account.counter, next(self._sequence), account))

    def _keep_idle(self, account: _Account) -> None:
        self._idle[account.key] = account
        if len(self._idle) > self._most_idle:
            self._idle.popitem(last=False)

    def _compact(self) -> None:
        """Forget those who left: while the first is blocked, they never come to the top."""
        for _, _, account in self._heap:
            account.listed = account.waiting
        self._heap = [entry for entry in self._heap if entry[2].waiting]
        heapq.heapify(self._heap)
