"""When a lower class has its turn although a higher one waits.

Pure. Called by `actors.policies.fairness`. The classes are served in order; but what a higher class is served while
a lower one waits earns the lower one a share, by weight, and once this pays for its next ticket it has one turn.
What it gets while no higher class waits costs it nothing. Virtual counters between classes would do the same for
classes that always wait; a class that comes and goes, though, is lifted to the others' level each time, and then
every burst of the higher class would let a ticket of the lower one in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from actors.types import PriorityClass

# 97 : 3 : 0.1 of the tokens while all three wait: the order, and nothing starves.
CLASS_WEIGHTS: Mapping[PriorityClass, float] = {
    PriorityClass.INTERACTIVE: 1000.0,
    PriorityClass.STANDARD: 30.0,
    PriorityClass.BATCH: 1.0,
}


class ClassShares:
    """What each class has earned while it waited behind a higher one, in tokens.

    The next ticket of a class, of c tokens, has its turn at the latest when the classes above it have been served
    c times their weight over its own, and one ticket more.

    Args:
        weights: share of each class while they all wait.
    """

    def __init__(self, weights: Mapping[PriorityClass, float]) -> None:
        self._weights = {**CLASS_WEIGHTS, **weights}
        self._earned = dict.fromkeys(PriorityClass, 0.0)

    def next(
        self, waiting: Iterable[PriorityClass], cost: Callable[[PriorityClass], float]
    ) -> PriorityClass | None:
        """Whose turn it is among the classes that wait, which are given in order.

        Args:
            waiting: the classes that wait, highest first.
            cost: tokens of the next ticket of a class.
        """
        highest = None
        for priority in waiting:
            if highest is None:
                highest = priority
            elif self._earned[priority] > 0.0 and self._earned[priority] >= cost(priority):
                return priority
        return highest

    def served(self, priority: PriorityClass, tokens: float, waiting: Iterable[PriorityClass]) -> None:
        """A ticket had its turn.

        Args:
            priority: its class.
            tokens: its prompt and predicted output.
            waiting: the classes that waited, its own included.
        """
        passed = False
        for other in waiting:
            if other.rank > priority.rank:
                self._earned[other] += tokens * self._weights[other] / self._weights[priority]
            passed = passed or other.rank < priority.rank
        if passed:
            self._earned[priority] = max(self._earned[priority] - tokens, 0.0)

    def left(self, priority: PriorityClass) -> None:
        """Nobody of the class waits any more: no claim outlives its need."""
        self._earned[priority] = 0.0
