"""The bound of the virtual token counters, watched from outside the queue.

While two tenants of a class both wait, what they are served, each over its weight, differs by no more than
`ClassLine` promises: 2·max(w_p·L, w_q·M)/min(weights), with L the longest prompt and M the most tokens that granted
tickets of the class hold together.
"""

from __future__ import annotations

import itertools
from typing import Any

from actors.policies.class_line import INPUT_WEIGHT, OUTPUT_WEIGHT, ClassLine
from actors.types import PriorityClass


class FairnessWatch:
    """One queue's service by tenant; `look` is called after each of its steps.

    Args:
        dispatcher: the queue's.
        longest_prompt: L, of all requests that may come, what they come back with included.
    """

    def __init__(self, dispatcher: Any, longest_prompt: int) -> None:
        self._dispatcher = dispatcher
        self._longest_prompt = longest_prompt
        self._most_held = dict.fromkeys(PriorityClass, 0)
        self._served: dict[tuple[PriorityClass, str], float] = {}
        self._ranges: dict[tuple[PriorityClass, str, str], tuple[float, float]] = {}
        self.pairs = 0  # of tenants that waited together
        self.closest = 0.0  # share of the bound that was ever used
        self.wrong: str | None = None
        for priority, line in dispatcher.line._classes.items():
            self._listen(priority, line)

    def _listen(self, priority: PriorityClass, line: ClassLine) -> None:
        charge = line.counters.charge

        def charged(key: str, service: float) -> None:
            whose = priority, key
            self._served[whose] = self._served.get(whose, 0.0) + service / line.counters.weight(key)
            charge(key, service)

        line.counters.charge = charged  # type: ignore[method-assign]

    def look(self) -> None:
        """Compare every two tenants that wait."""
        if not self._ranges and not len(self._dispatcher.line):
            return
        for priority, line in self._dispatcher.line._classes.items():
            waiting = sorted(line._tenants)
            if len(waiting) > 1:
                self._most_held[priority] = max(self._most_held[priority], self._held(priority))
            for known in [pair for pair in self._ranges if pair[0] is priority]:
                if known[1] not in waiting or known[2] not in waiting:
                    del self._ranges[known]
            for one, other in itertools.combinations(waiting, 2):
                self._compare(priority, line, one, other)

    def _compare(self, priority: PriorityClass, line: ClassLine, one: str, other: str) -> None:
        served = self._served
        ahead = served.get((priority, one), 0.0) - served.get((priority, other), 0.0)
        pair = priority, one, other
        if pair not in self._ranges:
            self.pairs += 1
        low, high = self._ranges.get(pair, (ahead, ahead))
        self._ranges[pair] = low, high = min(low, ahead), max(high, ahead)
        lightest = min(line.counters.weight(one), line.counters.weight(other))
        most = max(INPUT_WEIGHT * self._longest_prompt, OUTPUT_WEIGHT * self._most_held[priority])
        bound = 2.0 * most / lightest
        self.closest = max(self.closest, (high - low) / bound)
        if high - low > bound + 1e-6 and self.wrong is None:
            self.wrong = (
                f"{priority}: {one} and {other} were served {high - low:.1f} apart; the bound is {bound:.1f}"
            )

    def _held(self, priority: PriorityClass) -> int:
        return sum(
            held.tokens()
            for replica in self._dispatcher.pool.replicas.values()
            for held in replica.held.values()
            if held.ticket.principal.priority is priority
        )
