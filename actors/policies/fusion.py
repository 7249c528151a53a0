"""Reciprocal rank fusion: one ranking out of several, by ranks alone.

Pure. `actors.retriever` fuses what the vector index and BM25 found. From Cormack, Clarke and Büttcher,
"Reciprocal rank fusion outperforms Condorcet and individual rank learning methods" (SIGIR 2009), with weights
and a score that is scaled to 0..1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# The paper's 60 is for pools of a thousand; with the short lists here it lets everything that both rankings
# know pass what one of them is sure of.
RANK_CONSTANT = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranking:
    """Ids, best first, and how much this ranking counts."""

    ids: Sequence[str]
    weight: float = 1.0


def fuse(rankings: Sequence[Ranking], rank_constant: int = RANK_CONSTANT) -> list[tuple[str, float]]:
    """Ids with their fused scores, best first.

    An id gets `weight / (rank_constant + rank)` from each ranking it is in; divided by what being first
    everywhere gives, so 1.0 is "first in all rankings" and an id that only one of two equal rankings knows has
    at most 0.5. Of equals the one that stands higher in the earliest ranking comes first.

    Args:
        rankings: at least one with a weight above 0, else everything scores 0.
        rank_constant: how slowly ranks lose value.
    """
    best = sum(ranking.weight for ranking in rankings) / (rank_constant + 1)
    if best <= 0:
        return []
    scores: dict[str, float] = {}
    for ranking in rankings:
        for rank, one in enumerate(ranking.ids, start=1):
            scores[one] = scores.get(one, 0.0) + ranking.weight / (rank_constant + rank)
    ordered = sorted(scores.items(), key=lambda item: -item[1])
    return [(one, min(score / best, 1.0)) for one, score in ordered]  # rounding may pass 1
