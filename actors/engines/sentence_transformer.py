"""Embedding models of the sentence-transformers library, in process.

The library loads the model and runs its modules (transformer, pooling, normalisation); cutting into windows
and batching are ours, since its own `encode` cuts long texts off without a word. `actors.engines.embedding`
makes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from actors.engines.embedding import (
    EmbeddingKind,
    EmbeddingModelConfig,
    EmbeddingModelInfo,
    Tokenized,
    Vectors,
    source_of,
)
from actors.errors import EngineFailed, InvalidRequest
from actors.policies.batching import windows

_WINDOW_TOKENS = 512  # of a model that does not say what it reads at once
_OVERLAP_SHARE = 8  # neighbouring windows share an eighth of what they can hold


class SentenceTransformerModel:
    """See `actors.engines.embedding.EmbeddingModel`, which it implements.

    Args:
        config: see `EmbeddingModelConfig`.

    Raises:
        EngineFailed: it cannot be loaded.
    """

    def __init__(self, config: EmbeddingModelConfig) -> None:
        import torch
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.set_num_threads(config.threads)
        self._torch = torch
        device = None if config.device == "auto" else config.device
        try:
            self._model: Any = SentenceTransformer(source_of(config.model), device=device)
            self._model = self._model.to(getattr(torch, config.dtype)).eval()
            tokenizer = self._model.tokenizer
            # A copy without the truncation and padding that the library sets: safe in any thread.
            backend = tokenizer.backend_tokenizer
            self._tokenizer: Any = type(backend).from_str(backend.to_str())
        except EngineFailed:
            raise
        except Exception as error:
            raise EngineFailed(f"the embedding model {config.model} cannot be loaded: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._pad = int(tokenizer.pad_token_id or 0)
        self._type_ids = "token_type_ids" in tokenizer.model_input_names
        self._special = frozenset(int(one) for one in tokenizer.all_special_ids)
        self._frames: dict[EmbeddingKind, tuple[tuple[int, ...], tuple[int, ...]]] = {
            "query": self._frame("query"),
            "passage": self._frame("document", "passage"),
        }
        most = int(self._model.max_seq_length or _WINDOW_TOKENS)
        self._info = EmbeddingModelInfo(
            model=config.model,
            dimensions=int(self._model.get_embedding_dimension()),
            window_tokens=min(most, config.window_tokens or most),
        )
        longest = max(len(before) + len(after) for before, after in self._frames.values())
        if longest >= self._info.window_tokens:
            raise EngineFailed(f"the prompt of {config.model} fills its window; raise window_tokens")
        # The first run allocates and picks kernels; a model that loads and cannot run fails here.
        self.embed(self.tokenize(["warm up"], "query")[0].windows)

    @property
    def info(self) -> EmbeddingModelInfo:
        """What it is."""
        return self._info

    def tokenize(self, inputs: Sequence[str | Sequence[int]], kind: EmbeddingKind) -> list[Tokenized]:
        """Cut inputs into windows; ids of special tokens in an input are ignored, as in a text they cannot be."""
        texts = [item for item in inputs if isinstance(item, str)]
        encoded = iter(self._tokenizer.encode_batch(texts, add_special_tokens=False))
        ids = [
            next(encoded).ids if isinstance(item, str) else self._known(item, at)
            for at, item in enumerate(inputs)
        ]
        return [self._cut(one, kind, index) for index, one in enumerate(ids)]

    def embed(self, windows: Sequence[Sequence[int]]) -> Vectors:
        """One row per window; they are padded to the longest."""
        torch = self._torch
        longest = max(len(window) for window in windows)
        ids = np.full((len(windows), longest), self._pad, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, window in enumerate(windows):
            ids[row, : len(window)] = window
            mask[row, : len(window)] = 1
        features = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        if self._type_ids:
            features["token_type_ids"] = torch.zeros_like(features["input_ids"])
        with torch.inference_mode():
            moved = {name: tensor.to(self._model.device) for name, tensor in features.items()}
            found = self._model(moved)["sentence_embedding"].float()
            rows: Vectors = torch.nn.functional.normalize(found, dim=1).cpu().numpy()
        return rows

    def _frame(self, *prompts: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What stands before and after the text: special tokens, and the prompt that the model was trained with."""
        texts = (self._model.prompts.get(name) for name in prompts)
        prompt = next((text for text in texts if text), "")
        content = self._tokenizer.encode("a", add_special_tokens=False).ids
        whole = self._tokenizer.encode("a").ids
        at = next(i for i in range(len(whole)) if whole[i : i + len(content)] == content)
        before = (*whole[:at], *self._tokenizer.encode(prompt, add_special_tokens=False).ids)
        return before, tuple(whole[at + len(content) :])

    def _known(self, ids: Sequence[int], index: int) -> list[int]:
        size = self._tokenizer.get_vocab_size()
        if not all(0 <= one < size for one in ids):
            raise InvalidRequest(f"token ids of this model are 0 to {size - 1}", f"input[{index}]")
        return [one for one in ids if one not in self._special]

    def _cut(self, ids: Sequence[int], kind: EmbeddingKind, index: int) -> Tokenized:
        if not ids:
            raise InvalidRequest("must hold at least one token that is not blank", f"input[{index}]")
        before, after = self._frames[kind]
        room = self._info.window_tokens - len(before) - len(after)
        spans = windows(len(ids), room, room // _OVERLAP_SHARE)
        cut = tuple((*before, *ids[start:end], *after) for start, end in spans)
        return Tokenized(windows=cut, tokens=len(ids) + len(before) + len(after))
