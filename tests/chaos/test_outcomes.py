"""What callers check is checked here: each way in which an answer can go wrong falls into its class."""

import asyncio
import json
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest

from tests.chaos import load
from tests.chaos.load import ask, words
from tests.chaos.outcomes import Outcome

COUNT = 6


def event(content):
    return {"choices": [{"delta": {"content": content}}]}


def sse(events, *, done=True, tokens=COUNT):
    lines = [f"data: {json.dumps(one)}\n\n" for one in events]
    lines.append(f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': tokens}})}\n\n")
    return "".join(lines) + ("data: [DONE]\n\n" if done else "")


@asynccontextmanager
async def answering(head, body_of, *, ends=True):
    """A server that answers each request with `body_of` the words that were asked for."""

    async def answer(reader, writer):
        size = int((await reader.readuntil(b"\r\n\r\n")).split(b"content-length: ")[1].split(b"\r\n")[0])
        asked = json.loads(await reader.readexactly(size))["messages"][0]["content"]
        payload = body_of(asked.split(" ")).encode()
        frame = b"%x\r\n%b\r\n" % (len(payload), payload)
        writer.write(head.encode() + b"transfer-encoding: chunked\r\n\r\n" + frame)
        writer.write(b"0\r\n\r\n" if ends else b"")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield SimpleNamespace(http=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")


def pieces(text):
    first, *rest = text
    return [event(first), *(event(f" {word}") for word in rest)]


def duplicated(text):
    made = pieces(text)
    return sse([*made[:3], made[2], *made[3:]])


ERROR = {"error": {"code": "engine_failed", "message": "it died"}}
STREAMS = {
    "whole": (lambda text: sse(pieces(text)), Outcome.OK),
    "a token twice": (duplicated, Outcome.DUP_OR_GAP),
    "a token missing": (lambda text: sse([*pieces(text)[:2], *pieces(text)[3:]]), Outcome.DUP_OR_GAP),
    "the end missing": (lambda text: sse(pieces(text)[:-1]), Outcome.DUP_OR_GAP),
    "counted wrong": (lambda text: sse(pieces(text), tokens=COUNT + 1), Outcome.DUP_OR_GAP),
    "no [DONE]": (lambda text: sse(pieces(text)[:3], done=False), Outcome.SILENT_TRUNC),
    "an error event": (lambda text: sse([*pieces(text)[:3], ERROR], done=False), Outcome.CLEAN_ERROR),
    "an error event and [DONE]": (lambda text: sse([*pieces(text)[:3], ERROR]), Outcome.SILENT_TRUNC),
    "an error behind a wrong token": (
        lambda text: sse([*pieces(text)[1:3], ERROR], done=False),
        Outcome.DUP_OR_GAP,
    ),
}


@pytest.mark.parametrize("how", STREAMS)
async def test_a_stream_falls_into_its_class(how):
    body_of, outcome = STREAMS[how]
    async with answering("HTTP/1.1 200 OK\r\n", body_of) as server:
        call = await ask(server, COUNT, stream=True)
    assert call.outcome == outcome, call


async def test_a_body_that_stops_is_a_broken_connection():
    async with answering("HTTP/1.1 200 OK\r\n", lambda text: sse(pieces(text)), ends=False) as server:
        assert (await ask(server, COUNT, stream=True)).outcome == Outcome.CONN_ERROR


async def test_nobody_listening_is_a_broken_connection():
    call = await ask(SimpleNamespace(http="http://127.0.0.1:9"), COUNT, stream=True)
    assert call.outcome == Outcome.CONN_ERROR


@pytest.mark.parametrize(
    ("head", "text", "outcome"),
    [
        ("HTTP/1.1 429 X\r\nretry-after: 2\r\n", json.dumps(ERROR), Outcome.SHED),
        ("HTTP/1.1 503 X\r\nretry-after: 2\r\n", json.dumps(ERROR), Outcome.CLEAN_ERROR),
        ("HTTP/1.1 500 X\r\n", "Internal Server Error", Outcome.CONN_ERROR),
    ],
)
async def test_a_refusal_falls_into_its_class(head, text, outcome):
    async with answering(head, lambda _: text) as server:
        assert (await ask(server, COUNT, stream=False)).outcome == outcome


def test_words_are_one_token_each_and_no_two_callers_share_them():
    from actors.engines.scripted_tokenizer import split

    assert len(split(words(10**6, 500))) == 500
    assert words(1, 5) != words(36**3 + 1, 5)
    assert load.difference("a b x", "a b c") == "differs at 4 of 5: 'x' for 'c'"
