"""When requests arrive and how long their answers are: pure, and the same for the same seed.

Called by the open-loop benchmarks. Counts are exact, so two runs of one trace put the same work on a system.
"""

import itertools
import random
from collections.abc import Sequence


def steady(count: int, seconds: float, rng: random.Random) -> list[float]:
    """`count` arrivals of a Poisson process within `seconds`, in order."""
    return sorted(rng.uniform(0, seconds) for _ in range(count))


def bursts(count: int, seconds: float, cv: float, rng: random.Random) -> list[float]:
    """`count` arrivals within `seconds` whose gaps are gamma distributed.

    Args:
        count: arrivals.
        seconds: when the last one comes: the gaps are stretched to it.
        cv: coefficient of variation of a gap; 1 is a Poisson process, 9 bursts with long pauses.
        rng: source of chance.
    """
    shape = 1 / cv**2
    times = list(itertools.accumulate(rng.gammavariate(shape, 1.0) for _ in range(count)))
    return [seconds * at / times[-1] for at in times]


def lengths(count: int, least: int, most: int, rng: random.Random) -> list[int]:
    """`count` lengths between the two whose mean is the middle, up to one for rounding: each with its mirror image."""
    half = [rng.randint(least, most) for _ in range((count + 1) // 2)]
    found = [length for one in half for length in (one, least + most - one)][:count]
    rng.shuffle(found)
    return found


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` (0 to 1) of all are not above; 0 of nothing."""
    ordered = sorted(values)
    return ordered[max(-int(-share * len(ordered) // 1) - 1, 0)] if ordered else 0.0


def largest_gap(served: Sequence[tuple[float, float]]) -> float:
    """The largest difference of service between two over any interval.

    Args:
        served: (time, service) in any order; service of the one is positive, of the other negative.
    """
    running = [0.0, *itertools.accumulate(service for _, service in sorted(served))]
    return max(running) - min(running)
