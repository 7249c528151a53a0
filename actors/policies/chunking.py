"""Cuts a parsed document into overlapping chunks of tokens, and names versions and chunks.

Owns the chunking strategy (its bounds are OpenAI's) and the ids that make ingestion idempotent: the same
bytes, strategy and embedding model give the same version, the same version gives the same chunk ids.
`actors.ingestion` calls it. How text becomes tokens is the caller's `Tokenize`; how a chunk longer than the
embedding model's window is embedded is the embedder's business.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from actors.errors import InvalidRequest
from actors.types import Chunk

Tokenize = Callable[[str], Sequence[tuple[int, int]]]
"""Character spans `(start, end)` of a text's tokens, in order, without special tokens."""

# Part of every version: raise it when parsing or cutting changes, and documents are ingested anew.
_FORMAT = "1"

_BLOCK_CHARS = 20_000  # tokenised at once: bounds the memory of a tokeniser, which keeps much per token
_PARAGRAPH = re.compile(r"\n[^\S\n]*\n\s*")
# An end mark with closing quotes and brackets, then space; a full-width end mark (CJK); a new line.
_SENTENCE = re.compile(r"""[.!?\u2026]["'\u201d\u2019)\]]*\s+|[\u3002\uff01\uff1f]\s*|\n\s*""")
_ROUGH_TOKEN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w{1,6}|[^\w\s]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunking:
    """OpenAI's static strategy; the defaults are what its "auto" means.

    Raises:
        InvalidRequest: a bound is broken.
    """

    max_chunk_size_tokens: int = 800  # 100 to 4096
    chunk_overlap_tokens: int = 400  # at most half of the size

    def __post_init__(self) -> None:
        """Refuse sizes outside OpenAI's bounds."""
        if not 100 <= self.max_chunk_size_tokens <= 4096:
            raise InvalidRequest(
                "max_chunk_size_tokens must be between 100 and 4096",
                "chunking_strategy.static.max_chunk_size_tokens",
            )
        if not 0 <= self.chunk_overlap_tokens <= self.max_chunk_size_tokens // 2:
            raise InvalidRequest(
                "chunk_overlap_tokens must be between 0 and half of max_chunk_size_tokens",
                "chunking_strategy.static.chunk_overlap_tokens",
            )


def document_version(source_sha256: str, chunking: Chunking, embedding_model: str) -> str:
    """The version that these bytes, cut and embedded this way, always get."""
    return _digest(
        _FORMAT,
        source_sha256,
        str(chunking.max_chunk_size_tokens),
        str(chunking.chunk_overlap_tokens),
        embedding_model,
    )


def chunk_id(vector_store_id: str, file_id: str, version: str, ordinal: int) -> str:
    """The id of one chunk in every index."""
    return _digest(vector_store_id, file_id, version, str(ordinal))


def window_id(chunk: str, number: int) -> str:
    """The index entry of one window of a chunk: models read less at once than a chunk may hold.

    Args:
        chunk: the chunk's id.
        number: of the window; the first one has the chunk's own id.
    """
    return f"{chunk}.{number}" if number else chunk


def chunk_of(entry_id: str) -> str:
    """The chunk that an index entry belongs to: the inverse of `window_id`. A chunk counts by its best window."""
    return entry_id.partition(".")[0]


def _digest(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def make_chunks(
    text: str, spans: Sequence[tuple[int, int]], *, vector_store_id: str, file_id: str, version: str
) -> tuple[Chunk, ...]:
    """Chunks of `text` at `spans` (see `cut`), with their ids."""
    return tuple(
        Chunk(
            chunk_id=chunk_id(vector_store_id, file_id, version, ordinal),
            ordinal=ordinal,
            text=text[start:end],
            start=start,
            end=end,
        )
        for ordinal, (start, end) in enumerate(spans)
    )


def rough_tokens(text: str) -> list[tuple[int, int]]:
    """Token spans when the model's tokeniser is not known: pieces of words of up to 6 characters."""
    return [match.span() for match in _ROUGH_TOKEN.finditer(text)]


def cut(text: str, chunking: Chunking, tokenize: Tokenize = rough_tokens) -> list[tuple[int, int]]:
    """Where to cut: character spans that together cover every character but white space.

    A chunk ends at the last paragraph, else sentence, else word that fits and leaves it more than half full;
    the next one begins at the first sentence, else word, inside the allowed overlap.

    Args:
        text: the parsed document.
        chunking: size and overlap, in tokens.
        tokenize: spans of the embedding model's tokens.
    """
    starts = _token_starts(text, tokenize)
    if not starts:
        return []
    breaks = _Breaks(text, starts)
    spans = (_trimmed(text, starts, first, end) for first, end in _windows(len(starts), chunking, breaks))
    return [(start, end) for start, end in spans if end > start]


def _windows(tokens: int, chunking: Chunking, breaks: _Breaks) -> Iterator[tuple[int, int]]:
    first = 0
    while True:
        limit = first + chunking.max_chunk_size_tokens
        if limit >= tokens:
            yield first, tokens
            return
        # More than half full, so that the next start (at most half a chunk back) always moves on.
        end = breaks.last(first + chunking.max_chunk_size_tokens // 2, limit)
        yield first, end
        first = breaks.first(end - chunking.chunk_overlap_tokens, end)


class _Breaks:
    """Token indexes at which a paragraph, a sentence or a word begins."""

    def __init__(self, text: str, starts: Sequence[int]) -> None:
        self._text = text
        self._starts = starts
        self._paragraphs = self._tokens_after(_PARAGRAPH)
        self._sentences = self._tokens_after(_SENTENCE)

    def _tokens_after(self, pattern: re.Pattern[str]) -> list[int]:
        return [bisect_left(self._starts, match.end()) for match in pattern.finditer(self._text)]

    def last(self, low: int, high: int) -> int:
        """The best place in (low, high] to end a chunk: the strongest kind of break, the latest of it."""
        for kind in (self._paragraphs, self._sentences):
            at = bisect_right(kind, high) - 1
            if at >= 0 and kind[at] > low:
                return kind[at]
        return self._word_or_cut(range(high, low, -1), high)

    def first(self, low: int, high: int) -> int:
        """The first sentence in [low, high), else the first word, else the first possible cut, else `high`."""
        at = bisect_left(self._sentences, low)
        if at < len(self._sentences) and self._sentences[at] < high:
            return self._sentences[at]
        return self._word_or_cut(range(low, high), high)

    def _word_or_cut(self, indexes: Iterable[int], otherwise: int) -> int:
        cuttable = [index for index in indexes if self._starts[index] > self._starts[index - 1]]
        words = (index for index in cuttable if self._text[self._starts[index] - 1].isspace())
        return next(words, cuttable[0] if cuttable else otherwise)


def _token_starts(text: str, tokenize: Tokenize) -> Sequence[int]:
    # Several tokens may lie in one character (the bytes of an emoji): each counts, and no cut falls between.
    starts = array("q")
    for begin, end in _blocks(text):
        starts.extend(begin + start for start, _ in tokenize(text[begin:end]))
    return starts


def _blocks(text: str) -> Iterator[tuple[int, int]]:
    begin = 0
    while begin < len(text):
        end = min(begin + _BLOCK_CHARS, len(text))
        if end < len(text):
            space = max(text.rfind("\n", begin, end), text.rfind(" ", begin, end))
            end = space + 1 if space > begin else end
        yield begin, end
        begin = end


def _trimmed(text: str, starts: Sequence[int], first: int, end: int) -> tuple[int, int]:
    # Up to the start of the next token, so characters that the tokeniser drops stay in their chunk.
    begin = starts[first] if first else 0
    stop = starts[end] if end < len(starts) else len(text)
    body = text[begin:stop]
    return begin + len(body) - len(body.lstrip()), begin + len(body.rstrip())
