"""What the engine suites ask and how they read answers."""

from __future__ import annotations

import asyncio
import itertools
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass, field
from typing import Any

from actors.types import (
    FinishReason,
    GenerationRequest,
    Message,
    ResponseFormat,
    SamplingParams,
    TokenDelta,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)

from .conftest import RunningEngine

_ids = itertools.count()
LONG = "Write out every number from one to two hundred in words, one after the other: " + ", ".join(
    f"number {number}" for number in range(1, 120)
)


@dataclass
class Choice:
    """The deltas of one choice, concatenated as `TokenDelta` says."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    calls: list[ToolCallDelta] = field(default_factory=list)
    finish_reason: FinishReason | None = None


@dataclass
class Answer:
    """A whole request."""

    choices: dict[int, Choice]
    usage: Usage

    @property
    def only(self) -> Choice:
        """The one choice."""
        assert list(self.choices) == [0]
        return self.choices[0]


def next_id() -> str:
    """A request id that was not used before."""
    return f"contract-{next(_ids)}"


def chat(text: str, *, response_format: ResponseFormat | None = None, **sampling: Any) -> GenerationRequest:
    """A question; greedy and short unless `sampling` says else."""
    return GenerationRequest(
        request_id=next_id(),
        messages=(Message(role="user", content=text),),
        sampling=SamplingParams(**{"temperature": 0.0, "max_tokens": 16, **sampling}),
        response_format=response_format or ResponseFormat(),
    )


def joined(deltas: Iterable[TokenDelta]) -> Answer:
    """A stream as a whole, checking on the way what holds for every one."""
    choices: dict[int, Choice] = defaultdict(Choice)
    usages: list[Usage] = []
    for delta in deltas:
        assert not usages, "nothing may follow the delta that carries usage"
        choice = choices[delta.choice]
        assert choice.finish_reason is None, "nothing may follow the end of a choice"
        choice.text += delta.text
        choice.token_ids += delta.token_ids
        choice.logprobs += delta.logprobs
        choice.calls += delta.tool_calls
        choice.finish_reason = delta.finish_reason
        if delta.usage is not None:
            usages.append(delta.usage)
    assert len(usages) == 1, "usage comes exactly once"
    assert all(choice.finish_reason is not None for choice in choices.values())
    return Answer(dict(choices), usages[0])


async def collect(running: RunningEngine, request: GenerationRequest) -> Answer:
    """Run a request to its end."""
    return joined([delta async for delta in running.engine.generate(request)])


def stream_of(running: RunningEngine, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
    """`generate` as a closable iterator: every engine's iterator has `aclose`."""
    stream: Any = running.engine.generate(request)
    assert hasattr(stream, "aclose")
    return stream


async def until_idle(running: RunningEngine) -> None:
    """Wait until nothing runs any more, as long as a step may take."""
    async with asyncio.timeout(running.step_bound_s):
        while (stats := running.engine.stats()).running or stats.waiting:
            await asyncio.sleep(0.005)
