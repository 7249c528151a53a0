"""The answer to a chat request, whole or as chunks, put together from token deltas.

`app.api.chat` feeds it. `ChatAnswer` collects; `ChatEvents` encodes each delta as it comes, for
`app.sse.EventStreamResponse`. Both end with an error when the engine stopped before the answer did.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.errors import EngineFailed
from actors.policies.citations import MarkerFilter, attribute
from actors.types import FinishReason, Passage, TokenDelta, TokenLogprob, ToolCallDelta, Usage
from app.schemas.common import usage_object
from app.sse import event, json_text, template

_HOLE = "\x00text\x00"  # no model name or id holds it


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerShape:
    """What is known of an answer before its first token."""

    id: str  # chatcmpl-… or cmpl-…
    model: str
    choices: int
    service_tier: str = "default"
    logprobs: bool = False
    passages: tuple[Passage, ...] = ()  # what the model was given as context
    include_usage: bool = False  # a stream ends with a usage chunk
    created: int = field(default_factory=lambda: int(time.time()))  # seconds since the epoch

    def head(self, kind: str) -> dict[str, Any]:
        """The fields that every object of the answer starts with."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "service_tier": self.service_tier,
            "system_fingerprint": None,
        }


class _Choice:
    """One choice as it grows: its text without citation markers, its calls, its end."""

    def __init__(self, passages: tuple[Passage, ...]) -> None:
        self.calls: list[dict[str, Any]] = []
        self.logprobs: list[dict[str, Any]] = []
        self.finish: FinishReason | None = None
        self._parts: list[str] = []
        self._passages = passages
        self._filter = MarkerFilter(len(passages)) if passages else None

    @property
    def text(self) -> str:
        return "".join(self._parts)

    def add_text(self, delta: TokenDelta) -> str:
        """The delta's text as the client sees it; without passages nothing is kept back."""
        if self._filter is None:
            return delta.text
        text = self._filter.feed(delta.text)
        return text + self._filter.flush() if delta.finish_reason else text

    def keep(self, text: str) -> None:
        self._parts.append(text)

    def add_call(self, piece: ToolCallDelta) -> None:
        while len(self.calls) <= piece.index:
            self.calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
        call = self.calls[piece.index]
        call["id"] = piece.id or call["id"]
        call["function"]["name"] = piece.name or call["function"]["name"]
        call["function"]["arguments"] += piece.arguments

    def annotations(self) -> list[dict[str, Any]]:
        if self._filter is None:
            return []
        citations = attribute(self.text, self._passages, self._filter.marks)
        return [file_citation(citation.passage, citation.index) for citation in citations]


class ChatAnswer:
    """A whole answer.

    Args:
        shape: what it looks like.
    """

    def __init__(self, shape: AnswerShape) -> None:
        self._shape = shape
        self._choices = [_Choice(shape.passages) for _ in range(shape.choices)]
        self._usage: Usage | None = None

    def add(self, delta: TokenDelta) -> None:
        """Take the next delta."""
        choice = self._choices[delta.choice]
        choice.keep(choice.add_text(delta))
        choice.logprobs += map(logprob_object, delta.logprobs)
        for piece in delta.tool_calls:
            choice.add_call(piece)
        choice.finish = delta.finish_reason or choice.finish
        self._usage = delta.usage or self._usage

    def body(self) -> dict[str, Any]:
        """The answer's JSON.

        Raises:
            EngineFailed: the deltas ended before the answer did.
        """
        usage = ended([choice.finish for choice in self._choices], self._usage)
        return {
            **self._shape.head("chat.completion"),
            "choices": [self._choice(index, choice) for index, choice in enumerate(self._choices)],
            "usage": usage_object(usage),
        }

    def _choice(self, index: int, choice: _Choice) -> dict[str, Any]:
        message: dict[str, Any] = {
            "role": "assistant",
            "content": choice.text or (None if choice.calls else ""),
            "refusal": None,
            "annotations": choice.annotations(),
        }
        if choice.calls:
            message["tool_calls"] = choice.calls
        return {
            "index": index,
            "message": message,
            "logprobs": {"content": choice.logprobs, "refusal": None} if self._shape.logprobs else None,
            "finish_reason": choice.finish,
        }


class ChatEvents:
    """The chunks of a streamed answer: role first, then one per delta, then usage when it was asked for.

    Args:
        shape: what the answer looks like.
    """

    def __init__(self, shape: AnswerShape) -> None:
        self._shape = shape
        self._choices = [_Choice(shape.passages) for _ in range(shape.choices)]
        self._head = shape.head("chat.completion.chunk")
        self._usage: Usage | None = None
        self._frames = [template(self._chunk(i, {"content": _HOLE}), _HOLE) for i in range(shape.choices)]

    def opening(self) -> bytes:
        """The role of every choice."""
        role = {"role": "assistant", "content": "", "refusal": None}
        return b"".join(event(self._chunk(index, role)) for index in range(self._shape.choices))

    def event(self, delta: TokenDelta) -> bytes:
        """One chunk; nothing when the delta has nothing to show (half a character, half a marker)."""
        if delta.usage is not None:
            self._usage = delta.usage
        choice = self._choices[delta.choice]
        text = choice.add_text(delta)
        if self._shape.passages:
            choice.keep(text)
        if delta.finish_reason or delta.tool_calls or delta.logprobs:
            return event(self._full_chunk(choice, delta, text))
        if not text:
            return b""
        before, after = self._frames[delta.choice]
        return b"%b%b%b" % (before, json_text(text), after)

    def closing(self) -> bytes:
        """The usage chunk, when it was asked for.

        Raises:
            EngineFailed: the deltas ended before the answer did.
        """
        usage = ended([choice.finish for choice in self._choices], self._usage)
        if not self._shape.include_usage:
            return b""
        return event({**self._head, "choices": [], "usage": usage_object(usage)})

    def _full_chunk(self, choice: _Choice, delta: TokenDelta, text: str) -> dict[str, Any]:
        content: dict[str, Any] = {"content": text} if text or delta.logprobs else {}
        if delta.tool_calls:
            content["tool_calls"] = [_call_piece(piece) for piece in delta.tool_calls]
        if delta.finish_reason:
            choice.finish = delta.finish_reason
            annotations = choice.annotations()
            if annotations:
                content["annotations"] = annotations
        logprobs = None
        if delta.logprobs:
            logprobs = {"content": [logprob_object(token) for token in delta.logprobs], "refusal": None}
        return self._chunk(delta.choice, content, logprobs, delta.finish_reason)

    def _chunk(
        self,
        index: int,
        delta: Mapping[str, Any],
        logprobs: Mapping[str, Any] | None = None,
        finish: FinishReason | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        chunk = {**self._head, "choices": [choice]}
        return {**chunk, "usage": None} if self._shape.include_usage else chunk


def ended(finishes: Sequence[FinishReason | None], usage: Usage | None) -> Usage:
    """The usage of an answer that is complete.

    Raises:
        EngineFailed: a choice has no end, or the tokens were not counted.
    """
    if usage is None or None in finishes:
        raise EngineFailed("the engine ended before the answer was complete; try again")
    return usage


def file_citation(passage: Passage, index: int) -> dict[str, Any]:
    """OpenAI's `file_citation` annotation; what follows `index` is ours.

    Args:
        passage: what the answer stands on.
        index: character offset in the answer.
    """
    return {
        "type": "file_citation",
        "file_id": passage.file_id,
        "filename": passage.filename,
        "index": index,
        "vector_store_id": passage.vector_store_id,
        "chunk_id": passage.chunk_id,
        "score": passage.score,
        "text": passage.text,
    }


def logprob_object(token: TokenLogprob) -> dict[str, Any]:
    """OpenAI's log probability of one token."""
    top = [_token_object(text, logprob) for text, logprob in token.top]
    return {**_token_object(token.token, token.logprob), "top_logprobs": top}


def _token_object(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _call_piece(piece: ToolCallDelta) -> dict[str, Any]:
    function: dict[str, Any] = {"arguments": piece.arguments}
    if piece.id is None and piece.name is None:
        return {"index": piece.index, "function": function}
    return {
        "index": piece.index,
        "id": piece.id,
        "type": "function",
        "function": {"name": piece.name, **function},
    }
