"""The load process of `open_loop`: it sends, keeps what comes, and looks into it when the load is over.

    python -m tests.benchmarks.callers URL < ARRIVALS        (JSON: a list of `Arrival`)

Every answer is checked to its last token: the scripted engine and the plain Serve deployments repeat the text that
they are sent, and each text is somebody's own. On stdout: when the load begins, then the list of `Answer` as JSON.
"""

import asyncio
import gc
import itertools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import uvloop

from tests.benchmarks.exchange import Exchange, exchange
from tests.benchmarks.open_loop import REFUSED, Answer, Arrival
from tests.chaos.load import Reading, body, words
from tests.chaos.outcomes import Call, Outcome

_HEAD_START_S = 0.5  # between the process being there and the first arrival
_GRACE_S = 0.5  # the error that says "too late" may come a little later


@dataclass(kw_only=True)
class _Request(Call):
    """One request: as it was sent, and what came."""

    arrival: Arrival
    text: str  # that must come
    due_at: float
    attempt: int
    token_times: list[float] = field(default_factory=list)
    came: Exchange | None = None
    broke: OSError | None = None
    piece_at: float = 0.0

    def arrived(self, now: float) -> None:  # `now` is when it is looked at
        del now
        self.token_times.append(self.piece_at)


class _Callers:
    """All callers of one load.

    Args:
        url: of the system under test.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._numbers = itertools.count()
        self.requests: list[_Request] = []

    async def run(self, arrivals: Sequence[Arrival]) -> None:
        """Let them come, and wait for the last one."""
        begins_at = time.monotonic() + _HEAD_START_S
        print(begins_at, flush=True)
        callers = []
        for arrival in sorted(arrivals, key=lambda arrival: arrival.at_s):
            await asyncio.sleep(max(begins_at + arrival.at_s - time.monotonic(), 0))
            callers.append(asyncio.create_task(self._caller(arrival, begins_at)))
        await asyncio.gather(*callers)

    async def _caller(self, arrival: Arrival, begins_at: float) -> None:
        due_at = begins_at + arrival.at_s
        while True:
            text = words(next(self._numbers), arrival.tokens)
            asked = await self._ask(arrival, text, due_at, 1)
            if asked.status in REFUSED and arrival.retry_s is not None and asked.came is not None:
                wait_s = arrival.retry_s or float(asked.came.headers.get("retry-after", 0))
                await asyncio.sleep(wait_s)
                await self._ask(arrival, text, asked.ended_at + wait_s, 2)
            due_at = time.monotonic()
            if arrival.again_until_s is None or due_at > begins_at + arrival.again_until_s:
                return

    async def _ask(self, arrival: Arrival, text: str, due_at: float, attempt: int) -> _Request:
        asked = _Request(
            number=0, started_at=time.monotonic(), arrival=arrival, text=text, due_at=due_at, attempt=attempt
        )
        self.requests.append(asked)
        headers = {**arrival.headers, "x-request-timeout-ms": str(round(1e3 * arrival.timeout_s))}
        asked.came, asked.broke = await exchange(
            self._url + arrival.path, _body(arrival, text), headers, arrival.timeout_s + _GRACE_S
        )
        asked.ended_at, asked.status = time.monotonic(), asked.came.status
        return asked


def _body(arrival: Arrival, text: str) -> dict[str, Any]:
    if arrival.service_s is not None:
        return {"text": text, "service_s": arrival.service_s}
    if arrival.counted:
        return {**body(text, stream=arrival.stream), "max_tokens": arrival.tokens, **arrival.extra}
    return body(text, stream=arrival.stream)


def _look(asked: _Request) -> Answer:
    """What an answer is worth."""
    assert asked.came is not None
    arrival = asked.arrival
    if asked.status != 200:
        asked.outcome, asked.detail = Outcome.CLEAN_ERROR, asked.came.body[:200].decode("utf-8", "replace")
    elif arrival.stream:
        _read(asked)
    elif asked.broke is None:
        whole = asked.came.body
        got = whole.decode() if arrival.service_s is not None else _content(whole)
        asked.outcome = Outcome.OK if got == asked.text else Outcome.DUP_OR_GAP
        asked.detail = "" if got == asked.text else f"{got[:60]!r} for {asked.text[:60]!r}"
    if asked.broke is not None and asked.outcome is not Outcome.DUP_OR_GAP:
        asked.outcome, asked.detail = Outcome.CONN_ERROR, repr(asked.broke)
    return Answer(
        label=arrival.label, tokens=arrival.tokens, due_at=asked.due_at, sent_at=asked.started_at,
        ended_at=asked.ended_at, outcome=str(asked.outcome), status=asked.status, detail=asked.detail,
        attempt=asked.attempt, token_times=asked.token_times,
    )  # fmt: skip


def _read(asked: _Request) -> None:
    """Take a stream as it came."""
    reading = Counting(asked) if asked.arrival.counted else Reading(asked, asked.text)
    for at, piece in asked.came.pieces:
        asked.piece_at = at
        reading.feed(piece)
    reading.finish()


def _content(whole: bytes) -> str:
    return json.loads(whole)["choices"][0]["message"]["content"]


class Counting:
    """A stream of events whose text nobody knows: tokens are counted.

    Args:
        asked: its request.
    """

    def __init__(self, asked: _Request) -> None:
        self._asked = asked
        self._rest = b""
        self._done = False

    def feed(self, piece: bytes) -> None:
        """Take bytes of the body."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data: {"):
                choices = json.loads(line[6:]).get("choices", ())
                if any(choice["delta"].get("content") for choice in choices):
                    self._asked.arrived(0.0)
            self._done = self._done or line == b"data: [DONE]"

    def finish(self) -> None:
        """The body has ended."""
        asked = self._asked
        came, wanted = len(asked.token_times), asked.arrival.tokens
        whole = self._done and came == wanted
        asked.outcome = Outcome.OK if whole else Outcome.CLEAN_ERROR
        asked.detail = "" if whole else f"{came} of {wanted} tokens" + ("" if self._done else ", no [DONE]")


def main() -> None:
    arrivals = [Arrival(**one) for one in json.loads(sys.stdin.readline())]
    callers = _Callers(sys.argv[1])
    gc.disable()  # a pause would count as the system's
    uvloop.run(callers.run(arrivals))
    uvloop.run(_report(callers.requests))


async def _report(requests: Sequence[_Request]) -> None:
    print(json.dumps([asdict(_look(one)) for one in requests]), flush=True)


if __name__ == "__main__":
    main()
