"""Coalescing by event-loop tick, and the reading end of a stream."""

import asyncio

import pytest

from actors.errors import DeadlineExceeded, ReplicaGone
from actors.handles.outbox import Coalescer, Outbox
from actors.handles.token_stream import TokenStream
from actors.types import TokenDelta, TokenLogprob, Usage


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


async def test_what_is_put_in_while_a_list_is_under_way_leaves_behind_it_in_one():
    sent, arrived = [], asyncio.Event()

    async def send(items):
        sent.append(items)
        await arrived.wait()
        if items == [2, 3]:
            raise ValueError("the next one leaves all the same")

    coalescer = Coalescer(send)
    for item in (1, 2, 3):
        coalescer.put(item)
        for _ in range(3):
            await asyncio.sleep(0)
    assert sent == [[1]]
    arrived.set()
    for _ in range(6):
        await asyncio.sleep(0)
    assert sent == [[1], [2, 3]]
    coalescer.put(4)
    for _ in range(3):
        await asyncio.sleep(0)
    assert sent[-1] == [4]


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


def delta(text, *, choice=0, **fields):
    return TokenDelta(choice, text, **fields)


async def test_a_stream_ends_after_the_delta_with_usage():
    tokens = TokenStream()
    tokens.push(delta("a"))
    tokens.push(delta("b", usage=Usage(1, 2)))
    assert (tokens.ended, tokens.taken) == (True, False)
    assert [d.text async for d in tokens] == ["a", "b"]
    assert tokens.taken


async def test_a_failure_is_raised_behind_what_had_arrived():
    tokens = TokenStream()
    tokens.push(delta("a"))
    tokens.end(ReplicaGone("gone"))
    tokens.end(None)
    assert (await anext(tokens)).text == "a"
    with pytest.raises(ReplicaGone):
        await anext(tokens)


async def test_a_reader_that_is_too_late_gets_the_error_at_once():
    tokens = TokenStream()
    tokens.push(delta("a"))
    tokens.end(DeadlineExceeded("late"), drop_unread=True)
    with pytest.raises(DeadlineExceeded):
        await anext(tokens)


async def test_a_waiting_reader_wakes_on_a_delta_and_on_a_failure():
    tokens = TokenStream()
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
    tokens = TokenStream()
    tokens.push(delta("a", token_ids=(1,)))
    tokens.push(delta("b", token_ids=(2, 3)))
    assert tokens.unread_tokens == 3
    assert [d.text for d in tokens.take_ready()] == ["a", "b"]
    assert (tokens.take_ready(), tokens.unread_tokens) == ([], 0)


async def test_what_a_slow_reader_has_not_read_is_merged_and_says_the_same():
    tokens, sent = TokenStream(), {0: [], 1: []}
    for number in range(1000):
        choice = number % 2
        fields = {"logprobs": (TokenLogprob("x", -1.0),)} if number % 100 < 2 else {}
        tokens.push(delta(f"{number} ", choice=choice, token_ids=(number,), **fields))
        sent[choice].append(number)
    for choice in (0, 1):
        tokens.push(delta("", choice=choice, finish_reason="stop", usage=Usage(1, 1000) if choice else None))
    assert tokens.unread_tokens == 1000
    assert len(tokens._deltas) < 200
    got = [one async for one in tokens]
    for choice in (0, 1):
        mine = [one for one in got if one.choice == choice]
        assert [token_id for one in mine for token_id in one.token_ids] == sent[choice]
        assert "".join(one.text for one in mine) == "".join(f"{number} " for number in sent[choice])
        assert [one.finish_reason for one in mine if one.finish_reason] == ["stop"]
        assert sum(len(one.logprobs) for one in mine) == 10
    assert got[-1].usage == Usage(1, 1000)


async def following(tokens, write):
    task = asyncio.ensure_future(tokens.follow(write))
    await asyncio.sleep(0)
    return task


async def test_a_reader_that_keeps_up_has_what_came_in_the_next_turn_of_the_loop():
    tokens, got = TokenStream(), []
    tokens.push(delta("a"))
    task = await following(tokens, lambda deltas: got.append([d.text for d in deltas]))
    tokens.push(delta("b"))
    tokens.push(delta("c"))
    assert got == [["a"]]
    await asyncio.sleep(0)
    assert got == [["a"], ["b", "c"]]
    assert (tokens.taken, tokens.unread_tokens) == (True, 0)
    tokens.push(delta("d", usage=Usage(1, 4)))
    await task
    assert got[2:] == [["d"]]


async def test_readers_of_one_loop_have_their_turn_together():
    streams, got = [TokenStream() for _ in range(3)], []
    tasks = [await following(one, lambda deltas: got.extend(d.text for d in deltas)) for one in streams]
    for number, tokens in enumerate(streams):
        tokens.push(delta(str(number), usage=Usage(1, 1)))
    await asyncio.sleep(0)
    assert got == ["0", "1", "2"]
    await asyncio.gather(*tasks)


async def test_while_a_write_waits_deltas_are_kept_and_come_together_afterwards():
    tokens, gate, got = TokenStream(), asyncio.Event(), []

    def write(deltas):
        got.append([d.text for d in deltas])
        return gate.wait() if len(got) == 1 else None

    task = await following(tokens, write)
    tokens.push(delta("a", token_ids=(1,)))
    await asyncio.sleep(0)
    for text in "bc":
        tokens.push(delta(text, token_ids=(1,)))
    await asyncio.sleep(0.01)
    assert (got, tokens.unread_tokens) == ([["a"]], 2)
    gate.set()
    await asyncio.sleep(0.01)
    tokens.push(delta("d", usage=Usage(1, 4)))
    await task
    assert got == [["a"], ["b", "c"], ["d"]]


async def test_a_write_that_fails_fails_its_reader_and_nobody_else():
    tokens = TokenStream()

    def write(_deltas):
        raise OSError("the connection is gone")

    task = await following(tokens, write)
    tokens.push(delta("a"))  # the bus goes on
    tokens.push(delta("b"))
    with pytest.raises(OSError, match="the connection is gone"):
        await task


async def test_a_followed_stream_that_fails_raises_behind_what_had_come():
    tokens, got = TokenStream(), []
    task = await following(tokens, lambda deltas: got.extend(d.text for d in deltas))
    tokens.push(delta("a"))
    tokens.end(ReplicaGone("gone"))
    with pytest.raises(ReplicaGone):
        await task
    assert got == ["a"]


async def test_a_reader_that_was_cancelled_is_called_no_more():
    tokens, got = TokenStream(), []
    task = await following(tokens, got.append)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    tokens.push(delta("a"))
    assert got == []
