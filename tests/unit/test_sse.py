from __future__ import annotations

import asyncio
import json
import math

import pytest

from actors.errors import ClientClosed, EngineFailed, ShoalError
from actors.types import TokenDelta
from app import sse
from app.sse import DONE, EventStreamResponse, begun, comment, event, json_text, template


class Context:
    """Runs the work; `leaves` makes the client leave instead."""

    def __init__(self, *, leaves: bool = False) -> None:
        self.leaves = leaves
        self.failures: list[Exception] = []

    async def guard(self, work):
        if self.leaves:
            work.close()
            raise ClientClosed("left")
        return await work

    def failed(self, error):
        self.failures.append(error)
        return error if isinstance(error, ShoalError) else ShoalError("internal error")

    def server_timing(self):
        return "decode;dur=1.00"

    def past_middleware(self, send):
        return send


class Encoder:
    def opening(self):
        return b"<open>"

    def event(self, delta):
        return f"<{delta.text}>".encode() if delta.text else b""

    def closing(self):
        return b"<close>"


class Stream:
    """Gives its items one by one; the rest of a list at once."""

    expires_at = math.inf

    def __init__(self, *items) -> None:
        self.items = list(items)
        self.closed = 0

    async def follow(self, write):
        for item in self.items:
            if isinstance(item, Exception):
                raise item
            pending = write(item if isinstance(item, list) else [item])
            if pending is not None:
                await pending

    async def aclose(self):
        self.closed += 1


def delta(text: str) -> TokenDelta:
    return TokenDelta(choice=0, text=text)


async def answer(stream, *, context=None, fail_send=False):
    sent = []

    async def send(message):
        if fail_send:
            raise OSError("gone")
        sent.append(message)

    response = EventStreamResponse(stream, Encoder(), context or Context(), {"x-a": "b"})
    await response({}, None, send)
    return sent


async def test_a_complete_stream_ends_with_its_stages_and_done():
    stream = Stream(delta("a"), delta("b"))
    sent = await answer(stream)
    assert [message.get("body") for message in sent[1:]] == [
        b"<open>", b"<a>", b"<b>", b"<close>: server-timing decode;dur=1.00\n\ndata: [DONE]\n\n",
    ]  # fmt: skip
    assert [message.get("more_body") for message in sent[1:]] == [True, True, True, False]
    assert dict(sent[0]["headers"])[b"content-type"] == b"text/event-stream; charset=utf-8"
    assert dict(sent[0]["headers"])[b"x-accel-buffering"] == b"no"
    assert dict(sent[0]["headers"])[b"x-a"] == b"b"
    assert b"content-length" not in dict(sent[0]["headers"])
    assert stream.closed


async def test_deltas_that_have_piled_up_leave_in_one_write_as_events_of_their_own():
    sent = await answer(Stream([delta("a"), delta("b"), delta("c")], delta("d")))
    assert [message["body"] for message in sent[2:4]] == [b"<a><b><c>", b"<d>"]


async def test_a_delta_that_says_nothing_is_no_write():
    sent = await answer(Stream(delta(""), delta("a")))
    assert [message["body"] for message in sent[1:3]] == [b"<open>", b"<a>"]


async def test_an_error_in_the_middle_is_one_event_and_then_the_end():
    stream, context = Stream(delta("a"), EngineFailed("it died")), Context()
    sent = await answer(stream, context=context)
    assert json.loads(sent[-1]["body"].removeprefix(b"data: "))["error"]["code"] == "engine_failed"
    assert sent[-1]["more_body"] is False
    assert DONE not in sent[-1]["body"]
    assert stream.closed
    assert [type(error) for error in context.failures] == [EngineFailed]


async def test_a_client_that_leaves_gets_nothing_more_and_the_stream_is_closed():
    stream = Stream(delta("a"))
    sent = await answer(stream, context=Context(leaves=True))
    assert [message["type"] for message in sent] == ["http.response.start"]
    assert stream.closed


async def test_a_send_that_fails_closes_the_stream():
    stream = Stream(delta("a"))
    with pytest.raises(OSError, match="gone"):
        await answer(stream, fail_send=True)
    assert stream.closed


async def test_a_cancelled_response_closes_the_stream():
    class Slow(Stream):
        async def follow(self, write):
            await asyncio.Event().wait()

    stream = Slow()
    task = asyncio.ensure_future(answer(stream))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert stream.closed


async def test_a_send_that_waits_is_waited_for_before_the_next():
    gate, sent = asyncio.Event(), []

    async def send(message):
        if message.get("body") == b"<a>":
            await gate.wait()
        sent.append(message.get("body"))

    response = EventStreamResponse(Stream(delta("a"), delta("b")), Encoder(), Context())
    task = asyncio.ensure_future(response({}, None, send))
    await asyncio.sleep(0.01)
    assert sent == [None, b"<open>"]
    gate.set()
    await task
    assert sent[2:4] == [b"<a>", b"<b>"]


async def test_what_is_begun_and_waits_can_be_cancelled_and_fails_as_it_would_have():
    ended = []

    async def work():
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            ended.append("cancelled")
            raise

    async def rest(left):
        await left

    task = asyncio.ensure_future(rest(begun(work())))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == ["cancelled"]


def test_a_template_and_a_text_make_the_same_bytes_as_the_whole():
    for text in ('plain "quoted" \\ back', "line\nbreak\u2028 \u0000 \ud7ff 🐟", ""):
        before, after = template({"a": "HOLE", "b": None}, "HOLE")
        assert before + json_text(text) + after == event({"a": text, "b": None})


def test_no_text_can_break_out_of_its_event():
    assert event({"text": "\n\ndata: [DONE]\n\n"}).count(b"\n") == 2
    assert comment("x") == b": x\n\n"


async def test_a_client_that_reads_nothing_is_given_up_behind_the_deadline(monkeypatch):
    monkeypatch.setattr(sse, "_LAST_READ_S", 0.01)
    stream = Stream(delta("a"), delta("b"))
    stream.expires_at = asyncio.get_running_loop().time()

    async def stuck(message):
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async with asyncio.timeout(2):
        await EventStreamResponse(stream, Encoder(), Context())({}, None, stuck)
    assert stream.closed == 1
