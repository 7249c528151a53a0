"""Turns what one engine step of vLLM gave a request into `TokenDelta`s.

Owned by one `VllmEngine.generate` call. It knows vLLM's `RequestOutput` by its attributes alone and imports
nothing of it, so tests need no engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from actors.engines.vllm_tools import ToolPlan, ToolStream
from actors.errors import CannotResume, InvalidRequest, ShoalError
from actors.types import (
    FinishReason,
    Progress,
    SamplingParams,
    TokenDelta,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)

_FINISH: dict[str, FinishReason] = {"stop": "stop", "length": "length", "repetition": "stop"}
_LOWEST_LOGPROB = -9999.0  # OpenAI's stand-in for minus infinity, which JSON cannot carry


class OutputMapper:
    """State of one request on its way out.

    Args:
        sampling: what was asked for.
        prompt_tokens: of the rendered prompt.
        echo: text that comes before every choice's own.
        tools: how tool calls come about, None when none can.
        constrained: whether the text must follow a schema.
    """

    def __init__(
        self,
        sampling: SamplingParams,
        prompt_tokens: int,
        *,
        echo: str,
        tools: ToolPlan | None,
        constrained: bool,
    ) -> None:
        self._constrained = constrained
        self._prompt_tokens = prompt_tokens
        self._top_logprobs = sampling.top_logprobs if sampling.logprobs else None
        self._streams: list[ToolStream] = [tools.new_stream() for _ in range(sampling.n)] if tools else []
        self._before = [echo] * sampling.n  # not sent yet
        self._called = [False] * sampling.n  # has the choice called a tool
        self._silent = [True] * sampling.n  # has the choice said nothing yet
        self._completion_tokens = 0
        self._cached_tokens = 0
        self.aborted = False

    def deltas(self, output: Any) -> list[TokenDelta]:
        """What `output` adds, in order; usage rides on the last delta of the request.

        An aborted request sets `aborted` and gives nothing.

        Raises:
            InvalidRequest: nothing could be said that follows the schema.
            ShoalError: the engine gave this request up; it goes on serving others.
        """
        self._cached_tokens = max(self._cached_tokens, output.num_cached_tokens or 0)
        last = len(output.outputs) - 1
        return [
            self._delta(completion, ends_request=output.finished and place == last)
            for place, completion in enumerate(output.outputs)
            if not self._given_up(completion)
        ]

    def take_over(self, choice: int, told: Iterable[tuple[str, int, bool]], progress: Progress) -> None:
        """Stand where the reader of an earlier attempt stands; before the first output.

        Args:
            choice: which.
            told: text, token id and whether it is the last, of every token that was delivered.
            progress: what the reader has; text of the tokens that it has not, comes with the next delta.

        Raises:
            CannotResume: the reader has more text than these tokens give.
        """
        if progress.finish_reason:
            self._completion_tokens += len(progress.token_ids)
            return
        shown, said = [], False
        for text, token_id, last in told:
            self._completion_tokens += 1
            said = said or bool(text)
            shown.append(self._text(choice, text, (token_id,), finished=last)[0])
        seen = "".join(shown)
        if progress.text_chars > len(seen):
            raise CannotResume("the reader has more of the answer than its tokens say")
        self._before[choice] = seen[progress.text_chars :]
        self._silent[choice] = not said

    def end(self, choice: int, reason: str) -> TokenDelta:
        """The end of a choice whose tokens have all been delivered."""
        before, self._before[choice] = self._before[choice], ""
        return TokenDelta(choice=choice, text=before, finish_reason=self._finish(choice, reason))

    def with_usage(self, delta: TokenDelta) -> TokenDelta:
        """A delta as the request's last."""
        return msgspec.structs.replace(delta, usage=self._usage())

    def _given_up(self, completion: Any) -> bool:
        reason = completion.finish_reason
        self._silent[completion.index] = self._silent[completion.index] and not completion.text
        says_nothing = reason == "stop" and self._silent[completion.index]
        if self._constrained and (reason == "error" or says_nothing):
            raise InvalidRequest(
                "the model's output cannot be held to this schema: it is too complex or allows nothing",
                param="response_format",
            )
        if reason == "error":
            raise ShoalError("the engine could not finish this request")
        self.aborted = self.aborted or reason == "abort"
        return self.aborted

    def _delta(self, completion: Any, *, ends_request: bool) -> TokenDelta:
        choice = completion.index
        self._completion_tokens += len(completion.token_ids)
        finished = completion.finish_reason is not None
        text, calls = self._text(choice, completion.text, completion.token_ids, finished=finished)
        before, self._before[choice] = self._before[choice], ""
        return TokenDelta(
            choice=choice,
            text=before + text,
            token_ids=tuple(completion.token_ids),
            logprobs=self._logprobs(completion),
            tool_calls=calls,
            finish_reason=self._finish(choice, completion.finish_reason),
            usage=self._usage() if ends_request else None,
        )

    def _text(
        self, choice: int, text: str, token_ids: Sequence[int], *, finished: bool
    ) -> tuple[str, tuple[ToolCallDelta, ...]]:
        if not self._streams:
            return text, ()
        text, calls = self._streams[choice].push(text, token_ids, finished=finished)
        self._called[choice] = self._called[choice] or bool(calls)
        return text, calls

    def _finish(self, choice: int, reason: str | None) -> FinishReason | None:
        if reason is None:
            return None
        mapped = _FINISH[reason]
        return "tool_calls" if mapped == "stop" and self._called[choice] else mapped

    def _usage(self) -> Usage:
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            cached_tokens=min(self._cached_tokens, self._prompt_tokens),  # delivered tokens may be cached too
        )

    def _logprobs(self, completion: Any) -> tuple[TokenLogprob, ...]:
        if self._top_logprobs is None or not completion.logprobs:
            return ()
        return tuple(
            _logprob(token_id, candidates, self._top_logprobs)
            for token_id, candidates in zip(completion.token_ids, completion.logprobs, strict=True)
        )


def _logprob(token_id: int, candidates: dict[int, Any], top: int) -> TokenLogprob:
    """One position: `candidates` holds the sampled token and the likeliest ones."""
    sampled = candidates[token_id]
    ranked: Sequence[Any] = sorted(candidates.values(), key=lambda candidate: candidate.rank)[:top]
    return TokenLogprob(
        token=sampled.decoded_token or "",
        logprob=_bounded(sampled.logprob),
        top=tuple((candidate.decoded_token or "", _bounded(candidate.logprob)) for candidate in ranked),
    )


def _bounded(logprob: float) -> float:
    return min(0.0, max(logprob, _LOWEST_LOGPROB))
