"""BM25 over the published chunks of one vector store, in this process.

`actors.index.bm25_cache` builds one per generation of a store and the retriever searches it. The weights are
`bm25s`'s (Lucene's variant); words are cut here. A chunk is scored by its best piece of about a hundred words,
so a long chunk does not win by touching many subjects (nDCG@10 on chunks of 800 tokens: .735 whole, .786 so).
"""

from __future__ import annotations

import re
import sys
from array import array
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from actors.index.protocol import IndexEntry, IndexHit
from actors.policies.batching import windows

FileKey = tuple[str, str]  # file id, document version

_PIECE_WORDS = 100
_WORD = re.compile(r"[^\W_]+")  # parts of identifiers are words of their own
_WIDE = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")  # scripts without spaces between words
_BYTES_PER_WEIGHT = 8  # a float32 and an int32 in the sparse matrix
_BYTES_PER_ENTRY = 500  # the objects around its text
_BYTES_PER_WORD = 120  # of the vocabulary: string, dict entry, int


def load() -> None:
    """Import what takes a second, so that no search has to."""
    import bm25s  # noqa: F401  for its side effect: it is there

    _stop_words()


def words(text: str) -> list[str]:
    """Lower-case words without English stop words and plural endings; pairs of characters where no spaces are."""
    return [term for word in _WORD.findall(text.lower()) for term in _terms(word)]


@lru_cache(maxsize=200_000)
def _terms(word: str) -> tuple[str, ...]:
    if word in _stop_words():
        return ()
    if len(word) > 1 and _WIDE.fullmatch(word):
        return tuple(word[at : at + 2] for at in range(len(word) - 1))
    return (_singular(word),)


@cache
def _stop_words() -> frozenset[str]:
    from bm25s.stopwords import STOPWORDS_EN_PLUS

    return frozenset(STOPWORDS_EN_PLUS)


def _singular(word: str) -> str:
    """Harman's S-stemmer ("How effective is suffixing?", JASIS 1991)."""
    if len(word) <= 3 or not word.endswith("s"):
        return word
    if word.endswith("ies"):
        return word if word.endswith(("eies", "aies")) else word[:-3] + "y"
    if word.endswith("es"):
        return word if word.endswith(("aes", "ees", "oes")) else word[:-1]
    return word if word.endswith(("us", "ss")) else word[:-1]


@dataclass(frozen=True, slots=True)
class CutFile:
    """One document version, its words already cut and numbered."""

    entries: tuple[IndexEntry, ...]
    pieces: tuple[array[int], ...]  # word numbers
    chunks: tuple[int, ...]  # which entry each piece belongs to


class Bm25Index:
    """What can be searched; never changes. An empty one is where to begin: `Bm25Index().replaced(...)`.

    Args:
        files: document versions, in their published order.
        vocabulary: numbers of the words in them.
    """

    def __init__(
        self, files: Mapping[FileKey, CutFile] | None = None, vocabulary: Mapping[str, int] | None = None
    ) -> None:
        self._files = dict(files or {})
        self._vocabulary = dict(vocabulary or {})
        self._entries = [entry for file in self._files.values() for entry in file.entries]
        self._keys = [key for key, file in self._files.items() for _ in file.entries]
        self._key_of = {entry.chunk_id: key for entry, key in zip(self._entries, self._keys, strict=True)}
        pieces, chunks = self._flat()
        self._chunks: npt.NDArray[np.int32] = np.array(chunks, dtype=np.int32)
        self._bm25 = _fit(pieces, self._vocabulary) if any(pieces) else None
        self._idf = _idf(self._bm25, len(pieces)) if self._bm25 else np.zeros(0)
        self.size_bytes = self._size()

    @property
    def files(self) -> frozenset[FileKey]:
        """The document versions in it."""
        return frozenset(self._files)

    def key_of(self, chunk_id: str) -> FileKey | None:
        """The document version in it that a chunk belongs to."""
        return self._key_of.get(chunk_id)

    def replaced(self, wanted: Iterable[FileKey], fresh: Mapping[FileKey, Sequence[IndexEntry]]) -> Bm25Index:
        """An index of other document versions; blocks for about a second per 5,000 fresh chunks.

        Args:
            wanted: the versions, in their published order.
            fresh: entries of those that are not in this index.
        """
        vocabulary = dict(self._vocabulary)
        files = {key: self._files.get(key) or _cut(fresh[key], vocabulary) for key in wanted}
        return Bm25Index(files, vocabulary)

    def search(self, text: str, k: int, wanted: Container[FileKey]) -> list[IndexHit]:
        """The best `k` entries of the wanted document versions that share a word with `text`.

        Returns:
            hits, best first. Scores are 0 to 1: the share of the query's information (the summed idf of its
            words, also of those that no document has) that the entry's best piece answers.
        """
        query = words(text)
        ids = [self._vocabulary[word] for word in query if word in self._vocabulary]
        if self._bm25 is None or not ids:
            return []
        unknown = _idf_of(0, len(self._chunks)) * (len(query) - len(ids))
        most = float(self._idf[ids].sum()) + unknown
        scores = self._bm25.get_scores_from_ids(ids)
        hits: dict[int, IndexHit] = {}
        for piece in _descending(scores, 4 * k):
            chunk = int(self._chunks[piece])
            if chunk in hits or self._keys[chunk] not in wanted:
                continue
            hits[chunk] = IndexHit(entry=self._entries[chunk], score=float(scores[piece]) / most)
            if len(hits) == k:
                break
        return list(hits.values())

    def _flat(self) -> tuple[list[array[int]], list[int]]:
        pieces: list[array[int]] = []
        chunks: list[int] = []
        first = 0
        for file in self._files.values():
            pieces += file.pieces
            chunks += [first + chunk for chunk in file.chunks]
            first += len(file.entries)
        return pieces, chunks

    def _size(self) -> int:
        texts = sum(sys.getsizeof(entry.text) + _BYTES_PER_ENTRY for entry in self._entries)
        pieces = sum(sys.getsizeof(piece) for file in self._files.values() for piece in file.pieces)
        weights = len(self._bm25.scores["data"]) * _BYTES_PER_WEIGHT if self._bm25 else 0
        return texts + pieces + weights + len(self._vocabulary) * _BYTES_PER_WORD


def _cut(entries: Sequence[IndexEntry], vocabulary: dict[str, int]) -> CutFile:
    pieces: list[array[int]] = []
    chunks: list[int] = []
    for index, entry in enumerate(entries):
        numbers = array("i", (vocabulary.setdefault(word, len(vocabulary)) for word in words(entry.text)))
        for start, end in windows(len(numbers), _PIECE_WORDS, 0):
            pieces.append(numbers[start:end])
            chunks.append(index)
    return CutFile(tuple(entries), tuple(pieces), tuple(chunks))


def _fit(pieces: Sequence[array[int]], vocabulary: dict[str, int]) -> Any:
    import bm25s

    bm25 = bm25s.BM25(method="lucene", backend="numpy")
    bm25.index((pieces, vocabulary), create_empty_token=False, show_progress=False)
    return bm25


def _idf(bm25: Any, pieces: int) -> npt.NDArray[np.float64]:
    return np.array([_idf_of(int(count), pieces) for count in np.diff(bm25.scores["indptr"])])


def _idf_of(found_in: int, pieces: int) -> float:
    """Lucene's idf, as `bm25s` weighs with it."""
    return float(np.log(1 + (pieces - found_in + 0.5) / (found_in + 0.5)))


def _descending(scores: npt.NDArray[np.float32], first: int) -> Iterator[int]:
    """Indexes of positive scores, best first; equal ones in their own order. Sorts no more than is asked for."""
    found = np.flatnonzero(scores > 0)
    while len(found):
        some = min(first, len(found))
        least = np.partition(scores[found], len(found) - some)[len(found) - some]
        best = found[scores[found] >= least]
        yield from best[np.argsort(-scores[best], kind="stable")].tolist()
        found = found[scores[found] < least]
        first *= 8
