"""A request's way through queue and bus: attempts, deadlines, and that every grant is given back once."""

import asyncio

import pytest

from actors.errors import DeadlineExceeded, EngineFailed, InvalidRequest, ReplicaGone
from actors.handles.model import Admission, ModelClient
from actors.handles.token_stream import TokenStream
from actors.telemetry import StageClock
from actors.types import GenerationRequest, Grant, Principal, TokenDelta, Usage

LAST = TokenDelta(0, "b", usage=Usage(1, 2))
FIRST = TokenDelta(0, "a")


class Queue:
    """Grants at once; notes what it is told."""

    def __init__(self):
        self.tickets, self.ended, self.gone_ids = [], [], []

    async def acquire(self, ticket):
        self.tickets.append(ticket)
        replica_id = f"a{len(self.tickets)}"
        return Grant(request_id=ticket.request_id, replica_id=replica_id, waited_s=0, attempt=ticket.attempt)

    def end(self, request_id, outcome):
        self.ended.append(outcome)

    def gone(self, replica_id, *, draining=False):
        self.gone_ids.append((replica_id, draining))


class Running:
    def __init__(self, tokens):
        self.tokens, self.cancelled = tokens, 0

    def cancel(self):
        self.cancelled += 1


class Pool:
    """Plays one script per attempt: deltas and errors, all in one tick."""

    def __init__(self, *scripts):
        self.scripts = list(scripts)
        self.running = []

    async def start(self, _replica_id, _request, on_end):
        script = self.scripts.pop(0)
        if script and isinstance(script[0], ReplicaGone):
            raise script[0]
        tokens = TokenStream(on_end)
        self.running.append(Running(tokens))
        asyncio.get_running_loop().call_soon(self._play, tokens, script)
        return self.running[-1]

    @staticmethod
    def _play(tokens, script):
        for step in script:
            if isinstance(step, TokenDelta):
                tokens.push(step)
            else:
                tokens.end(step)


def client(*scripts):
    client = ModelClient("m", "g", lambda: None)
    client._queue, client._pool = Queue(), Pool(*scripts)
    return client


async def generate(client, timeout_s=30.0, *, whole=False):
    settled = []
    admission = Admission(
        principal=Principal(tenant="t"),
        prompt_tokens=1,
        predicted_output_tokens=1,
        timeout_s=timeout_s,
        whole=whole,
    )
    request = GenerationRequest(request_id="r", prompt="x")
    try:
        stream = await client.generate(request, admission, StageClock(), settled.append)
    except BaseException as error:
        return error, settled
    return stream, settled


async def test_an_answer_settles_and_frees_its_grant_once():
    model = client([FIRST, LAST])
    stream, settled = await generate(model)
    assert [d.text async for d in stream] == ["a", "b"]
    await stream.aclose()
    assert model._queue.ended == ["answered"]
    assert settled == [LAST.usage]


async def test_an_answer_that_came_whole_leaves_no_timer_behind():
    stream, _ = await generate(client([FIRST, LAST]), timeout_s=3600)
    assert stream._expiry is None
    slow = client([FIRST])
    stream, _ = await generate(slow, timeout_s=3600)
    slow._pool.running[0].tokens.push(LAST)
    assert stream._expiry.cancelled()


@pytest.mark.parametrize("error", [ReplicaGone("x"), EngineFailed("x")])
async def test_a_failure_behind_the_first_delta_that_nobody_has_read_is_tried_again(error):
    model = client([FIRST, error], [FIRST, LAST])
    stream, settled = await generate(model)
    assert [d.text async for d in stream] == ["a", "b"]
    assert model._queue.ended == ["retried", "answered"]
    assert settled == [LAST.usage]
    assert model._pool.running[0].cancelled == 1


async def test_a_failure_after_the_first_token_ends_the_stream_with_one_error():
    model = client([FIRST])
    stream, settled = await generate(model)
    assert (await anext(stream)).text == "a"
    model._pool.running[0].tokens.end(ReplicaGone("x"))
    with pytest.raises(ReplicaGone):
        await anext(stream)
    assert (model._queue.ended, settled) == (["failed"], [None])


async def test_three_attempts_are_made_and_the_last_failure_is_told():
    model = client(*([ReplicaGone(str(n))] for n in range(3)))
    error, settled = await generate(model)
    assert error.message == "2"
    assert model._queue.ended == ["retried", "retried", "failed"]
    assert [t.attempt for t in model._queue.tickets] == [1, 2, 3]
    assert [t.returning for t in model._queue.tickets] == [False, True, True]
    assert settled == [None]


async def test_the_deadline_holds_before_the_first_token_too():
    model = client([])
    error, settled = await generate(model, timeout_s=0.05)
    assert isinstance(error, DeadlineExceeded)
    assert model._queue.ended == ["expired"]
    assert (model._pool.running[0].cancelled, settled) == (1, [None])


async def test_the_deadline_in_the_middle_is_an_error_and_stops_the_engine():
    model = client([FIRST])
    stream, settled = await generate(model, timeout_s=0.05)
    with pytest.raises(DeadlineExceeded):
        [delta async for delta in stream]
    assert (model._queue.ended, settled) == (["expired"], [None])
    assert model._pool.running[0].cancelled == 1


async def test_a_client_that_leaves_before_the_first_token_frees_its_grant():
    model = client([])
    task = asyncio.ensure_future(generate(model))
    await asyncio.sleep(0.01)
    task.cancel()
    error, settled = await task
    assert isinstance(error, asyncio.CancelledError)
    assert (model._queue.ended, settled) == (["cancelled"], [None])
    assert model._pool.running[0].cancelled == 1


async def test_a_bad_request_is_not_tried_again():
    model = client([InvalidRequest("no")])
    error, _ = await generate(model)
    assert isinstance(error, InvalidRequest)
    assert model._queue.ended == ["failed"]


async def test_an_engine_that_failed_gets_nothing_more():
    model = client([FIRST])
    await generate(model)
    model._pool.running[0].tokens.end(EngineFailed("x"))
    assert model._queue.gone_ids == [("a1", False)]


async def test_an_answer_that_is_wanted_whole_begins_again_wherever_it_was():
    model = client([FIRST], [FIRST, LAST])
    task = asyncio.ensure_future(generate(model, whole=True))
    await asyncio.sleep(0.01)
    assert not task.done()
    model._pool.running[0].tokens.end(ReplicaGone("in the middle"))
    stream, settled = await task
    assert [d.text async for d in stream] == ["a", "b"]
    assert stream.ttft_s > 0.005
    assert model._queue.ended == ["retried", "answered"]
    assert settled == [LAST.usage]


async def test_the_deadline_of_an_answer_that_is_wanted_whole_stops_the_engine():
    model = client([FIRST])
    error, settled = await generate(model, timeout_s=0.05, whole=True)
    assert isinstance(error, DeadlineExceeded)
    assert (model._queue.ended, settled, model._pool.running[0].cancelled) == (["expired"], [None], 1)


async def test_a_client_that_leaves_while_its_whole_answer_is_made_stops_the_engine():
    model = client([FIRST])
    task = asyncio.ensure_future(generate(model, whole=True))
    await asyncio.sleep(0.01)
    task.cancel()
    await task
    assert (model._queue.ended, model._pool.running[0].cancelled) == (["cancelled"], 1)
