"""Counting tokens without the model: for tickets, limits and chunking.

Owns the counters and the size of a rendered prompt. The gateway sizes tickets with it, the scripted engine
counts its prompts with it (so ticket and usage agree exactly there), chunking measures pieces with it. A real
model's usage comes from its engine; here its chat template is an upper estimate per message.
"""

from __future__ import annotations

import json
import math
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from actors.engines import scripted_tokenizer
from actors.telemetry import logger
from actors.types import GenerationRequest, Message, ModelCard, Tool

SCRIPTED = "scripted"
BYTES_PER_TOKEN = 3.5  # on the safe side of the 4 that English text has in common vocabularies


class TokenCounter(Protocol):
    """How many tokens a text has for one model."""

    def count(self, text: str) -> int:
        """Tokens of `text`, without special tokens."""


class ScriptedCounter:
    """The scripted engine's own tokens: exact."""

    def count(self, text: str) -> int:
        """Tokens of `text`."""
        return len(scripted_tokenizer.split(text))


class EstimatedCounter:
    """An estimate for a model whose tokenizer is not here: UTF-8 bytes / 3.5, rounded up."""

    def count(self, text: str) -> int:
        """About how many tokens `text` has."""
        return math.ceil(len(text.encode("utf-8", "surrogatepass")) / BYTES_PER_TOKEN)


class FileCounter:
    """A model's own `tokenizer.json`, through the `tokenizers` library.

    Args:
        path: the file.

    Raises:
        ValueError: the file is no tokenizer.
    """

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer: Any = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a tokenizer: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def count(self, text: str) -> int:
        """Tokens of `text`; lone surrogates count as the replacement character."""
        clean = text.encode("utf-8", "replace").decode()
        return len(self._tokenizer.encode(clean, add_special_tokens=False).ids)


def counter_for(tokenizer: str) -> TokenCounter:
    """The counter for a card's `tokenizer`: "scripted", or a folder with `tokenizer.json`.

    A folder without the file (a model that lives on another machine, or is not unpacked yet) gives an estimate,
    and so does a file that is no tokenizer, after a warning in the log. Loading takes some 100 ms, once per file
    and process.
    """
    if tokenizer == SCRIPTED:
        return ScriptedCounter()
    path = Path(tokenizer) / "tokenizer.json"
    return _load(path) if path.is_file() else EstimatedCounter()


@lru_cache(maxsize=32)
def _load(path: Path) -> TokenCounter:
    try:
        return FileCounter(path)
    except ValueError as error:
        logger("tokens").warning("tokenizer_unusable", error=str(error))
        return EstimatedCounter()


def prompt_tokens(card: ModelCard, request: GenerationRequest) -> int:
    """Tokens of the prompt as the model will see it, chat template included.

    Exact for the scripted engine and for token ids; for other models the text is exact where their tokenizer is
    here, and each message adds `card.template_overhead_tokens`.
    """
    if request.prompt_token_ids is not None:
        return len(request.prompt_token_ids)
    count = counter_for(card.tokenizer).count
    if request.messages is None:
        return count(request.prompt or "")
    per_message = card.template_overhead_tokens
    messages = sum(per_message + count(text_of(message)) for message in request.messages)
    tools = sum(per_message + count(json_of(tool)) for tool in request.tools)
    return messages + tools


def text_of(message: Message) -> str:
    """Everything of a message that reaches the prompt, but its role."""
    calls = [part for call in message.tool_calls for part in (call.name, call.arguments)]
    return "\n".join(part for part in (message.name, message.content, *calls) if part)


def json_of(tool: Tool) -> str:
    """A tool as chat templates show it to the model."""
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return json.dumps({"type": "function", "function": function}, ensure_ascii=False)
