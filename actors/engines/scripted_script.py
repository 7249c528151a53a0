"""An answer laid out as tokens: what each engine step of one choice will deliver.

Made by the scripted engine when it accepts a request, from what `scripted_text` wants to say and from the
request's limits; read by `scripted_batch`, one delta per step. Stop strings, max tokens and the end of the
answer are settled here, before the first step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from actors.engines import scripted_tokenizer as tokenizer
from actors.engines.scripted_logprobs import token_logprob
from actors.engines.scripted_text import Answer
from actors.errors import CannotResume
from actors.types import (
    FinishReason,
    Progress,
    SamplingParams,
    TokenDelta,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Script:
    """One choice of one request: parallel sequences with an entry per token."""

    choice: int
    pieces: Sequence[str]  # the tokens' own text
    visible: Sequence[str]  # the text that becomes visible with each token
    calls: Sequence[tuple[ToolCallDelta, ...]]  # the tool call pieces that come with each token; or empty
    finish_reason: FinishReason
    top_logprobs: int | None  # None: no logprobs wanted
    start: int = 0  # tokens that an earlier attempt has delivered
    held: str = ""  # text of those that it has not: it comes with the next delta

    def __len__(self) -> int:
        """How many tokens it has, delivered ones too: at least one."""
        return len(self.pieces)

    def steps(self) -> Iterator[TokenDelta]:
        """One delta per token that is to come; the last one has the finish reason."""
        last = len(self.pieces) - 1
        held = self.held
        for at in range(self.start, len(self.pieces)):
            piece = self.pieces[at]
            yield TokenDelta(
                self.choice,
                held + self.visible[at],
                (tokenizer.token_id(piece),),
                () if self.top_logprobs is None else (token_logprob(piece, at, self.top_logprobs),),
                self.calls[at] if self.calls else (),
                self.finish_reason if at == last else None,
            )
            held = ""

    def whole(self) -> TokenDelta:
        """Everything that is to come in one delta; it may be the end alone."""
        return TokenDelta(
            self.choice,
            self.held + "".join(self.visible[self.start :]),
            tuple(map(tokenizer.token_id, self.pieces[self.start :])),
            self._logprobs(),
            tuple(itertools.chain.from_iterable(self.calls[self.start :])),
            self.finish_reason,
        )

    def behind(self, told: Progress) -> Script:
        """The rest of it, for a reader who has `told`.

        Raises:
            CannotResume: that is no beginning of this script.
        """
        start = len(told.token_ids)
        shown = "".join(self.visible[:start])
        ids = tuple(map(tokenizer.token_id, self.pieces[:start]))
        if ids != told.token_ids or told.text_chars > len(shown):
            raise CannotResume("the answer was begun by a model that says something else")
        return replace(self, start=start, held=shown[told.text_chars :])

    def _logprobs(self) -> tuple[TokenLogprob, ...]:
        if self.top_logprobs is None:
            return ()
        return tuple(
            token_logprob(self.pieces[at], at, self.top_logprobs)
            for at in range(self.start, len(self.pieces))
        )


def write(
    answer: Answer, *, choice: int, sampling: SamplingParams, limit_tokens: int, before: str = ""
) -> Script:
    """Lay out `answer`.

    Args:
        answer: what to say.
        choice: index of the choice.
        sampling: stop strings and logprobs are taken from here.
        limit_tokens: no more tokens than this: max_tokens, or what the context leaves.
        before: text shown before the first token without being produced (`echo`).
    """
    finish: FinishReason = "tool_calls" if answer.calls else "stop"
    pieces, calls = _call_tokens(answer.calls) if answer.calls else (tokenizer.split(answer.text), [])
    if len(pieces) > limit_tokens:
        pieces, finish = pieces[:limit_tokens], "length"
    visible = [""] * len(pieces) if answer.calls else pieces
    if sampling.stop and not answer.calls:
        visible, stopped = _until_stop(pieces, sampling.stop)
        pieces = pieces[: len(visible)]
        finish = "stop" if stopped else finish
    if before:
        visible = [before + visible[0], *visible[1:]]
    return Script(
        choice=choice,
        pieces=pieces,
        visible=visible,
        calls=calls[: len(pieces)],
        finish_reason=finish,
        top_logprobs=sampling.top_logprobs if sampling.logprobs else None,
    )


def stretched(answer: Answer, tokens: int) -> Answer:
    """Free text repeated and cut to exactly `tokens`; JSON and tool calls stay as they are."""
    if answer.calls or answer.structured:
        return answer
    repeats = math.ceil(tokens / len(tokenizer.split(answer.text)))
    pieces = tokenizer.split(" ".join([answer.text] * repeats))
    return Answer(text="".join(pieces[:tokens]))


def _call_tokens(calls: Sequence[ToolCall]) -> tuple[list[str], list[tuple[ToolCallDelta, ...]]]:
    """A call's name and id come whole with the last token of its name, then its arguments token by token."""
    pieces: list[str] = []
    deltas: list[tuple[ToolCallDelta, ...]] = []
    for index, call in enumerate(calls):
        name = tokenizer.split(call.name)
        arguments = tokenizer.split(call.arguments)
        pieces += [*name, *arguments]
        deltas += [()] * (len(name) - 1)
        deltas.append((ToolCallDelta(index, call.id, call.name),))
        deltas += [(ToolCallDelta(index, arguments=piece),) for piece in arguments]
    return pieces, deltas


def _until_stop(pieces: Sequence[str], stops: Sequence[str]) -> tuple[list[str], bool]:
    """The visible text per token up to the first stop string, and whether one was met.

    As a real engine would, without looking ahead: text that may be the beginning of a stop string is held back
    until the next tokens decide. The stop string itself is never shown.
    """
    text = "".join(pieces)
    starts = {stop: text.find(stop) for stop in stops if stop}
    ends = [(start + len(stop), start) for stop, start in starts.items() if start >= 0]
    end, cut = min(ends, default=(len(text) + 1, len(text)))
    longest = max(map(len, stops))
    visible: list[str] = []
    produced = shown = 0
    for piece in pieces:
        produced += len(piece)
        done = produced >= end
        show = cut if done else produced - _held(text[max(0, produced - longest) : produced], stops)
        visible.append(text[shown:show])
        shown = max(shown, show)
        if done:
            return visible, True
    visible[-1] += text[shown:]
    return visible, False


def _held(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that a stop string begins with."""
    longest = 0
    for stop in stops:
        for size in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:size]):
                longest = size
                break
    return longest
