"""The answer to a legacy completion, whole or as chunks, put together from token deltas.

`app.api.completions` feeds it, as `app.api.chat` feeds `app.schemas.chat_answers`.
"""

from __future__ import annotations

from typing import Any

from actors.types import FinishReason, TokenDelta, TokenLogprob, Usage
from app.schemas.chat_answers import AnswerShape, ended
from app.schemas.common import usage_object
from app.sse import event, json_text, template

_HOLE = "\x00text\x00"


class _Choice:
    """One choice as it grows. `offset` counts the characters of its tokens, for `text_offset`."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.logprobs: list[TokenLogprob] = []
        self.offset = 0
        self.finish: FinishReason | None = None


class CompletionAnswer:
    """A whole answer; choices of all prompts are numbered across.

    Args:
        shape: what it looks like.
    """

    def __init__(self, shape: AnswerShape) -> None:
        self._shape = shape
        self._choices = [_Choice() for _ in range(shape.choices)]
        self._usage: Usage | None = None

    def add(self, delta: TokenDelta) -> None:
        """Take the next delta."""
        choice = self._choices[delta.choice]
        choice.parts.append(delta.text)
        choice.logprobs += delta.logprobs
        choice.finish = delta.finish_reason or choice.finish
        self._usage = delta.usage or self._usage

    def body(self) -> dict[str, Any]:
        """The answer's JSON.

        Raises:
            EngineFailed: the deltas ended before the answer did.
        """
        usage = ended([choice.finish for choice in self._choices], self._usage)
        choices = [
            {
                "text": "".join(choice.parts),
                "index": index,
                "logprobs": logprobs_object(choice.logprobs, 0) if self._shape.logprobs else None,
                "finish_reason": choice.finish,
            }
            for index, choice in enumerate(self._choices)
        ]
        return {**self._shape.head("text_completion"), "choices": choices, "usage": usage_object(usage)}


class CompletionEvents:
    """The chunks of a streamed completion.

    Args:
        shape: what the answer looks like.
    """

    def __init__(self, shape: AnswerShape) -> None:
        self._shape = shape
        self._choices = [_Choice() for _ in range(shape.choices)]
        self._head = shape.head("text_completion")
        self._usage: Usage | None = None
        self._frames = [template(self._chunk(i, _HOLE), _HOLE) for i in range(shape.choices)]

    def opening(self) -> bytes:
        """Nothing: text has no role."""
        return b""

    def event(self, delta: TokenDelta) -> bytes:
        """One chunk."""
        if delta.usage is not None:
            self._usage = delta.usage
        if delta.finish_reason or delta.logprobs:
            return event(self._full_chunk(self._choices[delta.choice], delta))
        if not delta.text:
            return b""
        before, after = self._frames[delta.choice]
        return b"%b%b%b" % (before, json_text(delta.text), after)

    def closing(self) -> bytes:
        """The usage chunk, when it was asked for.

        Raises:
            EngineFailed: the deltas ended before the answer did.
        """
        usage = ended([choice.finish for choice in self._choices], self._usage)
        if not self._shape.include_usage:
            return b""
        return event({**self._head, "choices": [], "usage": usage_object(usage)})

    def _full_chunk(self, choice: _Choice, delta: TokenDelta) -> dict[str, Any]:
        choice.finish = delta.finish_reason or choice.finish
        logprobs = None
        if delta.logprobs:
            logprobs = logprobs_object(delta.logprobs, choice.offset)
            choice.offset += sum(len(token.token) for token in delta.logprobs)
        return self._chunk(delta.choice, delta.text, logprobs, delta.finish_reason)

    def _chunk(
        self,
        index: int,
        text: str,
        logprobs: dict[str, Any] | None = None,
        finish: FinishReason | None = None,
    ) -> dict[str, Any]:
        choice = {"text": text, "index": index, "logprobs": logprobs, "finish_reason": finish}
        chunk = {**self._head, "choices": [choice]}
        return {**chunk, "usage": None} if self._shape.include_usage else chunk


def logprobs_object(tokens: list[TokenLogprob] | tuple[TokenLogprob, ...], offset: int) -> dict[str, Any]:
    """The legacy shape: parallel lists.

    Args:
        tokens: in order.
        offset: characters of the tokens before.
    """
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.token)
    return {
        "tokens": [token.token for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [dict(token.top) for token in tokens],
        "text_offset": offsets,
    }
