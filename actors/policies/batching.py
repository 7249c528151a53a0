"""Micro-batches by token count: which pieces of text are embedded together, and how long texts are cut.

Pure. `actors.embedder` keeps one `BatchQueue` and drives it. A batch is padded to its longest piece, so what
it costs is pieces times longest; pieces of like length are put together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

T = TypeVar("T")

# So many waiting pieces are looked at for ones of like length: bounds the work per batch.
_LOOK_AHEAD = 512
# After so many batches of queries in a row a batch of passages runs, if any wait: ingestion slows down under a
# flood of queries and never stops. A query still waits for one batch of passages at most.
_QUERIES_IN_A_ROW = 16


def windows(tokens: int, window: int, overlap: int) -> list[tuple[int, int]]:
    """Spans of equal length, at most `window`, that cover `tokens` and overlap by `overlap`.

    Equal, so that the last window of a text that is just too long is not a scrap.

    Args:
        tokens: length of the text.
        window: the most that the model reads at once.
        overlap: shared by neighbours; less than `window`.
    """
    if tokens <= window:
        return [(0, tokens)]
    apart = tokens - overlap
    count = -(-apart // (window - overlap))
    return [(apart * n // count, apart * (n + 1) // count + overlap) for n in range(count)]


@dataclass(frozen=True, slots=True)
class _Piece(Generic[T]):
    item: T
    tokens: int
    since: float  # when it came, on the clock of `now`


class BatchQueue(Generic[T]):
    """Pieces that wait for the model: queries before passages, oldest first.

    Args:
        max_batch_tokens: padded tokens of one batch; a longer piece makes a batch of its own.
    """

    def __init__(self, max_batch_tokens: int) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._queries: deque[_Piece[T]] = deque()
        self._passages: deque[_Piece[T]] = deque()
        self._queries_in_a_row = 0
        self.tokens = 0  # that wait

    def __len__(self) -> int:
        return len(self._queries) + len(self._passages)

    def tokens_before(self, *, query: bool) -> int:
        """Tokens that a piece would wait for if it came now."""
        return sum(piece.tokens for piece in self._queries) if query else self.tokens

    def oldest_age_s(self, now: float) -> float:
        """How long the oldest piece has waited."""
        heads = [waiting[0].since for waiting in (self._queries, self._passages) if waiting]
        return now - min(heads) if heads else 0.0

    def push(self, item: T, tokens: int, *, query: bool, now: float) -> None:
        """Put a piece in line."""
        (self._queries if query else self._passages).append(_Piece(item, tokens, now))
        self.tokens += tokens

    def pop_batch(self, wanted: Callable[[T], bool]) -> list[T]:
        """Take the next batch: the oldest piece and the waiting ones nearest to it in length.

        Args:
            wanted: whether somebody still waits for a piece; the others are dropped.

        Returns:
            pieces in the order of their length; empty when nothing wanted waits.
        """
        for waiting in (self._queries, self._passages):
            self._drop(waiting, wanted)
        passages_next = self._passages and self._queries_in_a_row >= _QUERIES_IN_A_ROW
        waiting = self._queries if self._queries and not passages_next else self._passages
        self._queries_in_a_row = self._queries_in_a_row + 1 if waiting is self._queries else 0
        if not waiting:
            return []
        return [piece.item for piece in self._take(waiting)]

    def _drop(self, waiting: deque[_Piece[T]], wanted: Callable[[T], bool]) -> None:
        seen = [waiting.popleft() for _ in range(min(_LOOK_AHEAD, len(waiting)))]
        kept = [piece for piece in seen if wanted(piece.item)]
        self.tokens -= sum(piece.tokens for piece in seen) - sum(piece.tokens for piece in kept)
        waiting.extendleft(reversed(kept))
        if waiting and not kept:
            self._drop(waiting, wanted)

    def _take(self, waiting: deque[_Piece[T]]) -> list[_Piece[T]]:
        ahead = list(islice(waiting, _LOOK_AHEAD))
        first = ahead[0]
        nearest = sorted(ahead[1:], key=lambda piece: abs(piece.tokens - first.tokens))
        batch, longest = [first], first.tokens
        for piece in nearest:
            longest = max(longest, piece.tokens)
            if longest * (len(batch) + 1) > self._max_batch_tokens:
                break
            batch.append(piece)
        taken = {id(piece) for piece in batch}
        for _ in ahead:
            waiting.popleft()
        waiting.extendleft(piece for piece in reversed(ahead) if id(piece) not in taken)
        self.tokens -= sum(piece.tokens for piece in batch)
        return sorted(batch, key=lambda piece: piece.tokens)
