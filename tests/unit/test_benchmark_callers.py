"""The benchmarks' load process: what it calls an answer, and what it does not."""

import asyncio
import json

import pytest

from tests.benchmarks.open_loop import Answer, Arrival, WrongAnswer, run
from tests.chaos.load import words


@pytest.fixture
async def server():
    """A server that repeats what it is told, or what `reply` makes of it."""
    seen = []

    async def serve(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        size = next(int(line[16:]) for line in head.split(b"\r\n") if line.startswith(b"content-length: "))
        asked = json.loads(await reader.readexactly(size))
        seen.append(asked)
        writer.write(server.reply(asked, len(seen)))
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        server.seen = seen
        server.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield server


def whole(payload, status="200 OK", *headers):
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(payload)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + payload


def content(asked):
    return asked["messages"][-1]["content"]


def chat(text):
    return whole(json.dumps({"choices": [{"message": {"content": text}}]}).encode())


def events(texts, *, counted=None, done=True):
    found = [{"choices": [{"delta": {"content": text}}]} for text in texts]
    found.append({"choices": [], "usage": {"completion_tokens": len(texts) if counted is None else counted}})
    lines = [f"data: {json.dumps(event)}\n\n".encode() for event in found] + [b"data: [DONE]\n\n"] * done
    chunks = [b"%x\r\n%b\r\n" % (len(line), line) for line in lines]
    return b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + b"".join(chunks) + b"0\r\n\r\n"


def pieces(asked):
    first, *others = content(asked).split(" ")
    return [first, *(f" {other}" for other in others)]


async def answers(server, *arrivals):
    _, found = await asyncio.to_thread(run, server.url, arrivals)
    return found


async def test_an_answer_that_is_the_callers_own_is_ok(server):
    server.reply = lambda asked, _: chat(content(asked))
    [one] = await answers(server, Arrival(at_s=0.0, tokens=5, label="a", timeout_s=7))
    assert one.ok
    assert one.label == "a"
    assert one.sent_at >= one.due_at
    assert content(server.seen[0]) == words(0, 5)


async def test_somebody_elses_answer_ends_the_benchmark(server):
    server.reply = lambda *_: chat(words(77, 5))
    with pytest.raises(WrongAnswer):
        await answers(server, Arrival(at_s=0.0, tokens=5))


async def test_each_token_of_a_stream_has_its_time(server):
    server.reply = lambda asked, _: events(pieces(asked))
    [one] = await answers(server, Arrival(at_s=0.0, tokens=5, stream=True))
    assert one.ok
    assert len(one.token_times) == 5
    assert 0 <= one.ttft_s <= one.took_s


@pytest.mark.parametrize("spoil", [lambda texts: texts[:-1], lambda texts: [*texts, texts[-1]]])
async def test_a_token_that_is_lost_or_doubled_ends_the_benchmark(server, spoil):
    server.reply = lambda asked, _: events(spoil(pieces(asked)), counted=5)
    with pytest.raises(WrongAnswer):
        await answers(server, Arrival(at_s=0.0, tokens=5, stream=True))


async def test_a_stream_that_is_cut_is_no_answer(server):
    server.reply = lambda asked, _: events(pieces(asked))[:200]
    [one] = await answers(server, Arrival(at_s=0.0, tokens=5, stream=True))
    assert not one.ok


async def test_a_stream_of_unknown_text_is_counted(server):
    server.reply = lambda _, number: events(["x"] * (4 if number == 1 else 3))
    full, short = await answers(
        server,
        Arrival(at_s=0.0, tokens=4, stream=True, counted=True),
        Arrival(at_s=0.3, tokens=4, stream=True, counted=True),
    )
    assert full.ok
    assert not short.ok


async def test_a_refused_caller_comes_again_with_the_same_question_when_it_was_told_to(server):
    server.reply = lambda asked, number: (
        chat(content(asked)) if number == 2 else whole(b"{}", "429 Too Many", "Retry-After: 1")
    )
    first, second = await answers(server, Arrival(at_s=0.0, tokens=5, retry_s=0.0))
    assert first.refused
    assert not first.ok
    assert second.ok
    assert second.attempt == 2
    assert 1.0 <= second.sent_at - first.ended_at < 2.0
    assert content(server.seen[0]) == content(server.seen[1])


async def test_a_closed_loop_asks_on_until_its_end(server):
    server.reply = lambda asked, _: chat(content(asked))
    found: list[Answer] = await answers(server, Arrival(at_s=0.0, tokens=5, again_until_s=0.2))
    assert len(found) > 2
    assert all(one.ok for one in found)
    assert len({content(asked) for asked in server.seen}) == len(found)
