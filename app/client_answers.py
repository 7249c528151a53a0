"""What `app.client` gives back for a chat or completion: the stream, and the answer put together from its deltas."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from actors.errors import EngineFailed
from actors.handles.gateway import AnswerStream, GatewayClient
from actors.policies.citations import Citation, MarkerFilter, attribute
from actors.telemetry import Stage
from actors.types import FinishReason, GenerationCall, Passage, TokenDelta, TokenLogprob, ToolCall, Usage


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One complete choice."""

    text: str  # without citation markers
    finish_reason: FinishReason
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    citations: tuple[Citation, ...] = ()  # in the order of the text; only with retrieval


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatAnswer:
    """A complete answer."""

    request_id: str
    model: str
    choices: tuple[Choice, ...]
    usage: Usage
    passages: tuple[Passage, ...] = ()  # what the model was given as context, best first
    headers: Mapping[str, str] = field(default_factory=dict)  # x-ratelimit-*, x-shoal-degraded
    stage_s: Mapping[Stage, float] = field(default_factory=dict)  # seconds by stage, adding up to the whole

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text

    @property
    def citations(self) -> tuple[Citation, ...]:
        """The first choice's citations."""
        return self.choices[0].citations


class Growing:
    """One choice as it grows.

    Args:
        passages: what the model was given; without any, the text passes through as it is.
    """

    def __init__(self, passages: Sequence[Passage]) -> None:
        self._passages = passages
        self._filter = MarkerFilter(len(passages)) if passages else None
        self._texts: list[str] = []
        self._calls: list[ToolCall] = []
        self._logprobs: list[TokenLogprob] = []
        self._finish: FinishReason | None = None

    def add(self, delta: TokenDelta) -> str:
        """Take the next delta; returns the text that can be shown now."""
        text = delta.text
        if self._filter is not None:
            text = self._filter.feed(text) + (self._filter.flush() if delta.finish_reason else "")
        self._texts.append(text)
        self._logprobs += delta.logprobs
        self._finish = delta.finish_reason or self._finish
        for piece in delta.tool_calls:
            while len(self._calls) <= piece.index:
                self._calls.append(ToolCall(id="", name="", arguments=""))
            known = self._calls[piece.index]
            self._calls[piece.index] = ToolCall(
                id=piece.id or known.id,
                name=piece.name or known.name,
                arguments=known.arguments + piece.arguments,
            )
        return text

    def complete(self) -> Choice:
        """The choice.

        Raises:
            EngineFailed: it has no end.
        """
        if self._finish is None:
            raise EngineFailed("the engine ended before the answer was complete; try again")
        text = "".join(self._texts)
        citations = attribute(text, self._passages, self._filter.marks) if self._filter else ()
        return Choice(
            text=text,
            finish_reason=self._finish,
            tool_calls=tuple(self._calls),
            logprobs=tuple(self._logprobs),
            citations=citations,
        )


class ChatStream:
    """An answer as it comes: an async iterator of the first choice's text. Leaving it cancels the work.

    Nothing is asked before it is entered or iterated. Use it as `async with`, or read it to its end.
    """

    def __init__(self, gateway: GatewayClient, call: GenerationCall, timeout_s: float) -> None:
        self._gateway = gateway
        self._call = call
        self._timeout_s = timeout_s
        self._stream: AnswerStream | None = None
        self._choices: list[Growing] = []
        self._usage: Usage | None = None

    async def __aenter__(self) -> Self:
        """Ask; returns when the first token is at hand.

        Raises:
            ShoalError: anything that goes wrong before it.
        """
        await self._open()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Cancel what still runs."""
        await self.aclose()

    async def __aiter__(self) -> AsyncIterator[str]:
        """The first choice's text in pieces, without citation markers."""
        async for delta, text in self._pieces():
            if delta.choice == 0 and text:
                yield text

    async def deltas(self) -> AsyncIterator[TokenDelta]:
        """Everything as the engine gives it: all choices, tool calls, log probabilities."""
        async for delta, _ in self._pieces():
            yield delta

    async def answer(self) -> ChatAnswer:
        """The whole answer; reads what has not been read.

        Raises:
            ShoalError: it broke before its end.
        """
        async for _ in self._pieces():
            pass
        stream = await self._open()
        if self._usage is None or stream.stage_s is None:
            raise EngineFailed("the answer was closed before it was complete")
        return ChatAnswer(
            request_id=self._call.request.request_id,
            model=self._call.model,
            choices=tuple(choice.complete() for choice in self._choices),
            usage=self._usage,
            passages=stream.opening.passages,
            headers=stream.opening.headers,
            stage_s=stream.stage_s,
        )

    async def aclose(self) -> None:
        """Cancel what still runs, down to the engine. Safe to call twice and after the end."""
        if self._stream is not None:
            await self._stream.aclose()

    async def _open(self) -> AnswerStream:
        if self._stream is None:
            self._stream = await self._gateway.stream(self._call, self._timeout_s)
            passages = self._stream.opening.passages
            self._choices = [Growing(passages) for _ in range(self._call.request.sampling.n)]
        return self._stream

    async def _pieces(self) -> AsyncIterator[tuple[TokenDelta, str]]:
        stream = await self._open()
        async for delta in stream:
            self._usage = delta.usage or self._usage
            yield delta, self._choices[delta.choice].add(delta)
