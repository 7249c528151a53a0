"""Callers whose answers are known in advance, and an open loop of them.

The scripted engine repeats the last user message. The messages here are words of three letters, which are one token
each, numbered: a token that is lost, comes twice or belongs to somebody else shows.
"""

import asyncio
import itertools
import json
from collections.abc import Mapping
from typing import Any, Self

from tests.chaos.outcomes import Call, Outcome
from tests.chaos.wire import CHAT, Response, post
from tests.conftest import System

MODEL = "scripted"
CALL_TIMEOUT_S = 120
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_numbers = itertools.count()


def words(number: int, count: int) -> str:
    """`count` words, one token each; the first two name the caller."""
    place = [_word(number // 36**3), _word(number % 36**3)]
    return " ".join([*place, *(_word(position) for position in range(count - 2))])


def _word(number: int) -> str:
    return "".join(_DIGITS[number // 36**power % 36] for power in (2, 1, 0))


def body(text: str, *, stream: bool, **fields: Any) -> dict[str, Any]:
    """A chat request."""
    asked = {"model": MODEL, "temperature": 0, "messages": [{"role": "user", "content": text}], **fields}
    return asked | ({"stream": True, "stream_options": {"include_usage": True}} if stream else {})


async def ask(
    system: System,
    count: int,
    *,
    stream: bool,
    headers: Mapping[str, str] | None = None,
    label: str = "",
    call: Call | None = None,
    **fields: Any,
) -> Call:
    """One call for `count` tokens, checked to the last; never raises, however it ends.

    Args:
        system: who is asked.
        count: tokens of the answer.
        stream: as events, or whole.
        headers: of the request.
        label: kept on the call.
        call: written while it runs, for those who want to look.
        fields: of the body.
    """
    loop = asyncio.get_running_loop()
    number = next(_numbers)
    text = words(number, count)
    call = call or Call(number, loop.time())
    call.number, call.label, call.started_at = number, label, loop.time()
    try:
        async with (
            asyncio.timeout(CALL_TIMEOUT_S),
            post(system.http + CHAT, body(text, stream=stream, **fields), headers=headers) as response,
        ):
            call.status = response.status
            if response.status != 200:
                call.outcome, call.detail = await _refusal(response)
            elif stream:
                await Reading(call, text).read(response)
            else:
                call.outcome, call.detail = _whole(await response.json(), text, count)
    except (OSError, ValueError, asyncio.LimitOverrunError) as error:  # TimeoutError is an OSError
        call.outcome, call.detail = Outcome.CONN_ERROR, f"{error!r} after {call.tokens} of {count} tokens"
    call.ended_at = loop.time()
    return call


async def _refusal(response: Response) -> tuple[Outcome, str]:
    text = b"".join([piece async for piece in response.pieces()])
    try:
        error = json.loads(text)["error"]
    except (ValueError, KeyError, TypeError):
        return Outcome.CONN_ERROR, f"{response.status}: {text[:200]!r}"
    detail = f"{response.status}: {error['code']}: {error['message']}"
    if response.status == 429 and "retry-after" in response.headers:
        return Outcome.SHED, detail
    return Outcome.CLEAN_ERROR, detail


def _whole(answer: Any, text: str, count: int) -> tuple[Outcome, str]:
    got, tokens = answer["choices"][0]["message"]["content"], answer["usage"]["completion_tokens"]
    if got != text:
        return Outcome.DUP_OR_GAP, difference(got, text)
    if tokens != count:
        return Outcome.DUP_OR_GAP, f"{tokens} tokens counted, {count} came"
    return Outcome.OK, ""


def difference(got: str, text: str) -> str:
    """Where an answer leaves the right path."""
    same = next(
        (at for at, (a, b) in enumerate(zip(got, text, strict=False)) if a != b), min(len(got), len(text))
    )
    return f"differs at {same} of {len(text)}: {got[same : same + 24]!r} for {text[same : same + 24]!r}"


class Reading:
    """One stream of events as it is read."""

    def __init__(self, call: Call, text: str) -> None:
        self._call = call
        self._text = text
        self._got = ""
        self._rest = b""
        self._errors: list[str] = []
        self._dones = 0
        self._counted: int | None = None

    async def read(self, response: Response) -> None:
        """Read to the end and say what became of it."""
        try:
            async for piece in response.pieces():
                self.feed(piece)
        except OSError:
            if not self._text.startswith(self._got):
                self._end(Outcome.DUP_OR_GAP, difference(self._got, self._text))
                return
            raise
        self.finish()

    def feed(self, piece: bytes) -> None:
        """Take bytes of the body."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            if line == b"data: [DONE]":
                self._dones += 1
            elif line.startswith(b"data: "):
                self._event(json.loads(line[6:]))

    def _event(self, event: dict[str, Any]) -> None:
        if "error" in event:
            self._errors.append(f"{event['error']['code']}: {event['error']['message']}")
        if event.get("usage"):
            self._counted = event["usage"]["completion_tokens"]
        for choice in event.get("choices", ()):
            if content := choice["delta"].get("content"):
                self._got += content
                self._call.arrived(asyncio.get_running_loop().time())

    def finish(self) -> None:
        """The body ended well: what was in it?"""
        count = self._text.count(" ") + 1
        if not self._text.startswith(self._got):
            self._end(Outcome.DUP_OR_GAP, difference(self._got, self._text))
        elif len(self._errors) == 1 and not self._dones:
            self._end(Outcome.CLEAN_ERROR, self._errors[0])
        elif self._errors or self._dones != 1:
            came = f"{len(self._got)} of {len(self._text)} characters"
            detail = f"{len(self._errors)} errors, {self._dones} [DONE], {came}"
            self._end(Outcome.SILENT_TRUNC, detail)
        elif self._got != self._text:
            self._end(Outcome.DUP_OR_GAP, difference(self._got, self._text))
        elif self._counted != count:
            self._end(Outcome.DUP_OR_GAP, f"{self._counted} tokens counted, {count} came")
        else:
            self._end(Outcome.OK, "")

    def _end(self, outcome: Outcome, detail: str) -> None:
        self._call.outcome, self._call.detail = outcome, detail


class OpenLoop:
    """Callers that arrive at a fixed rate, whatever has become of the earlier ones.

    Use as a context; its end waits for the last answer. `calls` holds all that have begun.
    """

    def __init__(self, system: System, rate_rps: float, count: int, *, stream: bool, **more: Any) -> None:
        self._system = system
        self._pause_s = 1 / rate_rps
        self._ask = {"count": count, "stream": stream, **more}
        self.calls: list[Call] = []
        self._tasks: list[asyncio.Task[Call]] = []

    @property
    def open(self) -> int:
        """Callers that wait for something."""
        return sum(not task.done() for task in self._tasks)

    async def _arrive(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            call = Call(0, loop.time())
            self.calls.append(call)
            self._tasks.append(asyncio.create_task(ask(self._system, call=call, **self._ask)))
            due += self._pause_s
            await asyncio.sleep(max(due - loop.time(), 0))

    def stop(self) -> None:
        """Nobody new arrives."""
        self._arrivals.cancel()

    async def __aenter__(self) -> Self:
        self._arrivals = asyncio.create_task(self._arrive())
        return self

    async def __aexit__(self, failed: type[BaseException] | None, *_: object) -> None:
        self.stop()
        if failed is not None:
            for task in self._tasks:
                task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=failed is not None)
