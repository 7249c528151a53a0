"""An embedding model without weights: hashed bags of words, so that texts that share words are near.

Deterministic on every machine. For `configs/scripted.yaml`, tests and simulation; it knows no synonyms.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from actors.engines.embedding import (
    SCRIPTED,
    EmbeddingKind,
    EmbeddingModelConfig,
    EmbeddingModelInfo,
    Tokenized,
    Vectors,
)
from actors.errors import InvalidRequest
from actors.policies.batching import windows

_VOCABULARY = 1 << 31
_DIMENSIONS = 256
_HASHES = 4  # places of the vector that one word touches
_WINDOW_TOKENS = 256
_OVERLAP_SHARE = 8


class ScriptedEmbeddingModel:
    """See `actors.engines.embedding.EmbeddingModel`, which it implements.

    Args:
        config: `window_tokens` counts words here; there is nothing else to configure.
    """

    def __init__(self, config: EmbeddingModelConfig) -> None:
        self._info = EmbeddingModelInfo(
            model=SCRIPTED, dimensions=_DIMENSIONS, window_tokens=config.window_tokens or _WINDOW_TOKENS
        )

    @property
    def info(self) -> EmbeddingModelInfo:
        """What it is."""
        return self._info

    def tokenize(self, inputs: Sequence[str | Sequence[int]], kind: EmbeddingKind) -> list[Tokenized]:  # noqa: ARG002  it reads both kinds alike
        """Words, lower case, as hashes."""
        return [self._tokenized(item, index) for index, item in enumerate(inputs)]

    def embed(self, windows: Sequence[Sequence[int]]) -> Vectors:
        """One row per window."""
        rows = np.zeros((len(windows), _DIMENSIONS), dtype=np.float32)
        for row, window in zip(rows, windows, strict=True):
            ids, counts = np.unique(np.array(window, dtype=np.uint64), return_counts=True)
            for turn in range(_HASHES):
                mixed = _mix(ids + np.uint64(turn * _VOCABULARY))
                signs = np.where(mixed & np.uint64(1), 1.0, -1.0)
                np.add.at(row, (mixed >> np.uint64(1)) % np.uint64(_DIMENSIONS), signs * np.sqrt(counts))
            length = float(np.linalg.norm(row))
            row[:] = row / length if length > 0 else 1 / np.sqrt(_DIMENSIONS)
        return rows

    def _tokenized(self, item: str | Sequence[int], index: int) -> Tokenized:
        if isinstance(item, str):
            ids = [
                zlib.crc32(word.encode()) % _VOCABULARY for word in re.findall(r"\w+|[^\w\s]", item.lower())
            ]
        else:
            ids = list(item)
        if not ids or not all(0 <= one < _VOCABULARY for one in ids):
            raise InvalidRequest(
                f"must be a text that is not blank, or token ids below {_VOCABULARY}", f"input[{index}]"
            )
        spans = windows(len(ids), self._info.window_tokens, self._info.window_tokens // _OVERLAP_SHARE)
        return Tokenized(windows=tuple(tuple(ids[start:end]) for start, end in spans), tokens=len(ids))


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014): neighbouring ids become unrelated."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = values ^ (values >> np.uint64(31))
    return mixed
