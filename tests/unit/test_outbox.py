"""Coalescing by event-loop tick, and the reading end of a stream."""

import asyncio

import pytest

from actors.errors import ReplicaGone
from actors.handles.outbox import Coalescer, Outbox
from actors.handles.token_stream import TokenStream
from actors.types import TokenDelta, Usage


async def test_items_of_one_tick_leave_together_and_at_once():
    sent = []

    async def send(items):
        sent.append(items)

    coalescer = Coalescer(send)
    coalescer.put(1)
    coalescer.put(2)
    await asyncio.sleep(0)
    coalescer.put(3)
    for _ in range(3):
        await asyncio.sleep(0)
    assert sent == [[1, 2], [3]]


async def test_a_reader_takes_everything_that_gathered_since_it_looked():
    outbox = Outbox()
    batches = outbox.batches()
    outbox.put(1)
    outbox.put(2)
    assert await anext(batches) == [1, 2]
    outbox.put(3)
    outbox.close()
    assert [batch async for batch in batches] == [[3]]


async def test_a_reader_waits_for_the_rest_of_the_tick():
    outbox = Outbox()
    reader = asyncio.ensure_future(anext(outbox.batches()))
    await asyncio.sleep(0)
    loop = asyncio.get_running_loop()
    for item in range(3):  # three streams that wake in the same tick
        loop.call_soon(outbox.put, item)
    assert await reader == [0, 1, 2]


def stream():
    ends = []
    return TokenStream(ends.append), ends


def delta(text, **fields):
    return TokenDelta(0, text, **fields)


async def test_a_stream_ends_after_the_delta_with_usage_and_says_so_before_it_is_read():
    tokens, ends = stream()
    tokens.push(delta("a"))
    tokens.push(delta("b", usage=Usage(1, 2)))
    assert ends == [None]
    assert [d.text async for d in tokens] == ["a", "b"]
    assert tokens.usage == Usage(1, 2)


async def test_a_failure_is_raised_behind_what_had_arrived():
    tokens, ends = stream()
    tokens.push(delta("a"))
    tokens.end(ReplicaGone("gone"))
    tokens.end(None)
    assert (await anext(tokens)).text == "a"
    with pytest.raises(ReplicaGone):
        await anext(tokens)
    assert len(ends) == 1


async def test_a_waiting_reader_wakes_on_a_delta_and_on_a_failure():
    tokens, _ = stream()
    reader = asyncio.ensure_future(anext(tokens))
    await asyncio.sleep(0)
    tokens.push(delta("a"))
    assert (await reader).text == "a"
    reader = asyncio.ensure_future(anext(tokens))
    await asyncio.sleep(0)
    tokens.end(ReplicaGone("gone"))
    with pytest.raises(ReplicaGone):
        await reader


async def test_ready_deltas_are_taken_without_waiting():
    tokens, _ = stream()
    tokens.push(delta("a"))
    tokens.push(delta("b"))
    assert [d.text for d in tokens.take_ready()] == ["a", "b"]
    assert tokens.take_ready() == []
