"""The official client against the scripted engine, without queue and bus between them."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from pydantic import BaseModel

from actors.engines.scripted import ScriptedConfig, ScriptedEngine
from actors.types import TokenDelta


class EngineStream:
    """What a gateway makes of an engine's deltas."""

    expires_at = math.inf

    def __init__(self, deltas: AsyncIterator[TokenDelta]) -> None:
        self.passages, self.headers, self._deltas = (), {}, deltas

    def __aiter__(self) -> AsyncIterator[TokenDelta]:
        return self._deltas

    async def follow(self, write) -> None:
        async for delta in self:
            if (pending := write([delta])) is not None:
                await pending

    async def aclose(self) -> None:
        await self._deltas.aclose()


@pytest_asyncio.fixture(autouse=True)
async def engine(gateway):
    engine = ScriptedEngine(ScriptedConfig(fixed_service_s=0))
    await engine.start()
    gateway.answer = lambda call: EngineStream(engine.generate(call.request))
    yield engine
    await engine.stop()


@pytest.mark.parametrize("n", [1, 3])
async def test_streamed_and_whole_answers_are_the_same_text(client, n):
    ask = {
        "model": "m",
        "messages": [{"role": "user", "content": "the herring swims in the sea"}],
        "n": n,
        "seed": 1,
    }
    whole = await client.chat.completions.create(**ask)
    texts = [""] * n
    async for chunk in await client.chat.completions.create(**ask, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert "herring" in texts[0]


async def test_a_tool_is_called_and_its_result_answered_in_words(client):
    tool = {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {"days": {"type": "integer"}},
                "required": ["days"],
            },
        },
    }
    messages = [{"role": "user", "content": "call get_weather for 3 days"}]
    answer = await client.chat.completions.create(model="m", messages=messages, tools=[tool])
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls"
    assert json.loads(message.tool_calls[0].function.arguments) == {"days": 3}
    history = [
        *messages,
        message.model_dump(),
        {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"},
    ]
    answer = await client.chat.completions.create(model="m", messages=history, tools=[tool])
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content


async def test_streamed_structured_output_parses_to_its_class(client):
    class Fish(BaseModel):
        name: str
        length_cm: int

    async with client.chat.completions.stream(
        model="m", messages=[{"role": "user", "content": "a herring of 30 cm"}], response_format=Fish
    ) as stream:
        final = await stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Fish)


async def test_legacy_echo_and_logprobs(client):
    echoed = await client.completions.create(model="m", prompt="once upon", echo=True, max_tokens=4)
    assert echoed.choices[0].text.startswith("once upon")
    scored = await client.completions.create(model="m", prompt="once upon", logprobs=2, max_tokens=4)
    assert len(scored.choices[0].logprobs.tokens) == scored.usage.completion_tokens
