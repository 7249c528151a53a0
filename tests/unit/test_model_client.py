"""A request's way through queue and bus: attempts, deadlines, and that every grant is given back once."""

import asyncio

import pytest

from actors.errors import (
    CannotResume,
    ClientClosed,
    DeadlineExceeded,
    EngineFailed,
    FailedEverywhere,
    InvalidRequest,
    ReplicaGone,
)
from actors.handles.model import Admission, ModelClient
from actors.policies import hedging
from actors.telemetry import StageClock
from actors.types import GenerationRequest, Grant, Principal, Progress, SamplingParams, TokenDelta, Usage
from tests.unit.fake_serve import settle

LAST = TokenDelta(0, "b", (2,), usage=Usage(1, 2))
FIRST = TokenDelta(0, "a", (1,))


class Queue:
    """Grants at once; notes what it is told."""

    def __init__(self):
        self.tickets, self.ended, self.gone_ids, self.output_tokens = [], [], [], []

    async def acquire(self, ticket):
        self.tickets.append(ticket)
        replica_id = f"a{len(self.tickets)}"
        return Grant(request_id=ticket.request_id, replica_id=replica_id, waited_s=0, attempt=ticket.attempt)

    def end(self, request_id, outcome, output_tokens=0):
        self.ended.append(outcome)
        self.output_tokens.append(output_tokens)

    def gone(self, replica_id, *, draining=False):
        self.gone_ids.append((replica_id, draining))


class Running:
    """A start on a replica, and the sink that its tokens go to."""

    def __init__(self, request, attempt, sink):
        self.request, self.attempt, self.sink, self.cancelled = request, attempt, sink, 0

    def cancel(self):
        self.cancelled += 1

    def play(self, *steps):
        for step in steps:
            if isinstance(step, TokenDelta):
                self.sink.push(step)
            else:
                self.sink.end(step)


class Pool:
    """Plays one script per attempt: deltas and errors, all in one tick."""

    def __init__(self, *scripts):
        self.scripts = list(scripts)
        self.running = []

    async def start(self, _replica_id, request, attempt, sink):
        script = self.scripts.pop(0) if self.scripts else []
        if script and script[0] is START_FAILS:
            raise script[0]
        self.running.append(Running(request, attempt, sink))
        asyncio.get_running_loop().call_soon(self.running[-1].play, *script)
        return self.running[-1]


START_FAILS = ReplicaGone("it does not start")


def client(*scripts):
    client = ModelClient("m", "g", lambda: None)
    client._queue, client._pool = Queue(), Pool(*scripts)
    return client


async def generate(client, timeout_s=30.0, *, whole=False, **fields):
    settled = []
    admission = Admission(
        principal=Principal(tenant="t"),
        prompt_tokens=1,
        predicted_output_tokens=1,
        timeout_s=timeout_s,
        whole=whole,
    )
    request = GenerationRequest(request_id="r", prompt="x", **fields)
    try:
        stream = await client.generate(request, admission, StageClock(), settled.append)
    except BaseException as error:
        return error, settled
    return stream, settled


def word(number, **fields):
    return TokenDelta(0, f"w{number} ", (number,), **fields)


async def test_an_answer_settles_and_frees_its_grant_once():
    model = client([FIRST, LAST])
    stream, settled = await generate(model)
    assert [d.text async for d in stream] == ["a", "b"]
    await stream.aclose()
    assert (model._queue.ended, model._queue.output_tokens) == (["answered"], [2])
    assert settled == [LAST.usage]
    assert model._under_way == {}


async def test_an_answer_that_has_come_leaves_no_timer_behind():
    stream, _ = await generate(client([FIRST, LAST]), timeout_s=3600)
    assert stream._generation._expiry.cancelled()


@pytest.mark.parametrize("error", [ReplicaGone("x"), EngineFailed("x")])
async def test_a_stream_goes_on_from_the_exact_token_on_another_replica(error):
    model = client([word(0)])
    stream, settled = await generate(model)
    assert (await anext(stream)).text == "w0 "
    first = model._pool.running[0]
    first.play(word(1), error)
    first.play(word(99))  # what a dead replica still says goes nowhere
    await settle()
    second = model._pool.running[1]
    assert second.request.progress == (Progress(token_ids=(0, 1), text_chars=6),)
    assert (first.attempt, second.attempt) == (1, 2)
    second.play(word(2), word(3, usage=Usage(1, 4)))
    assert [d.text async for d in stream] == ["w1 ", "w2 ", "w3 "]
    assert (model._queue.ended, model._queue.output_tokens) == (["retried", "answered"], [2, 2])
    assert settled == [Usage(1, 4)]
    ticket = model._queue.tickets[1]
    assert (ticket.returning, ticket.attempt, ticket.prompt_tokens) == (True, 2, 3)


async def test_an_answer_that_was_begun_elsewhere_keeps_its_beginning_when_a_replica_dies():
    begun = Progress(token_ids=(0, 1), text_chars=6)
    model = client([word(2)])
    stream, _ = await generate(model, progress=(begun,))
    first = model._pool.running[0]
    assert first.request.progress == (begun,)
    assert model._queue.tickets[0].prompt_tokens == 3, "what is there is read again"
    first.play(ReplicaGone("x"))
    await settle()
    second = model._pool.running[1]
    assert second.request.progress == (Progress(token_ids=(0, 1, 2), text_chars=9),)
    second.play(word(3, usage=Usage(1, 4)))
    assert [d.text async for d in stream] == ["w2 ", "w3 "]


async def test_three_replicas_may_die_under_an_answer_then_its_reader_gets_one_error():
    model = client([word(0)])
    stream, settled = await generate(model)
    for number in range(3):
        await settle()
        model._pool.running[number].play(word(number + 1), ReplicaGone(str(number)))
    assert [(await anext(stream)).text for _ in range(4)] == ["w0 ", "w1 ", "w2 ", "w3 "]
    with pytest.raises(ReplicaGone, match="2"):  # it got on between them: that may not have been its doing
        await anext(stream)
    assert model._queue.ended == ["retried", "retried", "failed"]
    assert settled == [None]


async def test_a_request_under_which_three_replicas_die_without_a_token_is_told_so():
    model = client(*([ReplicaGone(str(number))] for number in range(3)))
    error, _ = await generate(model)
    assert isinstance(error, FailedEverywhere)
    assert error.message == "3 replicas failed under this request: 2"


async def test_a_start_that_fails_is_tried_elsewhere_and_the_last_failure_is_told():
    model = client([START_FAILS], [START_FAILS], [START_FAILS])
    error, settled = await generate(model)
    assert error is START_FAILS
    assert model._queue.ended == ["retried", "retried", "failed"]
    assert [t.attempt for t in model._queue.tickets] == [1, 2, 3]
    assert [t.returning for t in model._queue.tickets] == [False, True, True]
    assert settled == [None]


async def test_an_answer_that_cannot_go_on_begins_again_while_nobody_has_read_of_it():
    model = client(
        [word(0), ReplicaGone("x")], [CannotResume("grammar")], [word(5), word(6, usage=Usage(1, 2))]
    )
    stream, _ = await generate(model, whole=True)
    assert [d.text async for d in stream] == ["w5 ", "w6 "]
    assert [bool(one.request.progress) for one in model._pool.running] == [False, True, False]


async def test_an_answer_that_cannot_go_on_and_was_read_ends_with_one_error():
    model = client([word(0)], [CannotResume("grammar")])
    stream, _ = await generate(model)
    await anext(stream)
    model._pool.running[0].play(ReplicaGone("x"))
    with pytest.raises(CannotResume):
        await anext(stream)
    assert model._queue.ended == ["retried", "failed"]


async def test_a_preempted_answer_gives_its_slot_up_and_goes_on_later():
    model = client([word(0)])
    stream, _ = await generate(model)
    model.preempted("r")
    model.preempted("r")
    model.preempted("unknown")
    await settle()
    assert (model._queue.ended, model._pool.running[0].cancelled) == (["retried"], 1)
    assert [(t.attempt, t.returning) for t in model._queue.tickets] == [(1, False), (1, True)]
    assert [one.attempt for one in model._pool.running] == [1, 2]
    model._pool.running[1].play(word(1, usage=Usage(1, 2)))
    assert [d.text async for d in stream] == ["w0 ", "w1 "]


async def test_an_answer_that_is_preempted_on_its_way_to_the_replica_gives_its_slot_up_there():
    model = client()
    pool, arrive = model._pool, asyncio.Event()
    start = pool.start

    async def slow(*args):
        await arrive.wait()
        return await start(*args)

    pool.start = slow
    generating = asyncio.ensure_future(generate(model))
    await settle()
    model.preempted("r")
    arrive.set()
    await settle()
    assert (model._queue.ended, pool.running[0].cancelled) == (["retried"], 1)
    pool.running[1].play(word(0), word(1, usage=Usage(1, 2)))
    stream, _ = await generating
    assert [d.text async for d in stream] == ["w0 ", "w1 "]
    assert len(model._queue.tickets) == 2


async def test_what_is_preempted_says_whether_it_can_go_on():
    for fields, preemptible in [({}, True), ({"sampling": SamplingParams(n=2)}, False)]:
        model = client([FIRST])
        await generate(model, **fields)
        assert model._queue.tickets[0].preemptible is preemptible
    model = client([FIRST, LAST])
    await generate(model, whole=True, sampling=SamplingParams(n=2))
    assert model._queue.tickets[0].preemptible


async def test_the_deadline_holds_before_the_first_token_too():
    model = client([])
    error, settled = await generate(model, timeout_s=0.05)
    assert isinstance(error, DeadlineExceeded)
    assert model._queue.ended == ["expired"]
    assert (model._pool.running[0].cancelled, settled) == (1, [None])


async def test_the_deadline_in_the_middle_is_an_error_at_once_and_stops_the_engine():
    model = client([word(0), word(1)])
    stream, settled = await generate(model, timeout_s=0.05)
    await asyncio.sleep(0.1)  # a reader that is slow
    with pytest.raises(DeadlineExceeded):
        await anext(stream)
    assert (model._queue.ended, settled) == (["expired"], [Usage(1, 2)])
    assert model._pool.running[0].cancelled == 1


async def test_a_reader_that_leaves_too_much_unread_is_given_up():
    model = client([FIRST])
    stream, _ = await generate(model)
    for number in range(20_000):
        model._pool.running[0].play(word(number))
    with pytest.raises(ClientClosed, match="16384"):
        await anext(stream)
    assert (model._queue.ended, model._pool.running[0].cancelled) == (["cancelled"], 1)


async def test_a_client_that_leaves_before_the_first_token_frees_its_grant():
    model = client([])
    task = asyncio.ensure_future(generate(model))
    await asyncio.sleep(0.01)
    task.cancel()
    error, settled = await task
    assert isinstance(error, asyncio.CancelledError)
    assert (model._queue.ended, settled) == (["cancelled"], [None])
    assert model._pool.running[0].cancelled == 1


async def test_a_client_that_leaves_in_the_middle_pays_what_was_made():
    model = client([word(0), word(1)])
    stream, settled = await generate(model)
    await stream.aclose()
    assert (model._queue.ended, settled) == (["cancelled"], [Usage(1, 2)])


async def test_a_client_that_leaves_while_its_answer_waits_for_another_replica_leaves_the_line():
    model = client([word(0)])
    stream, settled = await generate(model)
    waiting = asyncio.Event()

    async def acquire(ticket):
        waiting.set()
        try:
            await asyncio.Event().wait()
        finally:
            model._queue.end(ticket.request_id, "cancelled")

    model._queue.acquire = acquire
    model._pool.running[0].play(ReplicaGone("x"))
    await waiting.wait()
    await stream.aclose()
    await settle()
    assert (model._queue.ended, settled) == (["retried", "cancelled"], [Usage(1, 1)])


async def test_a_bad_request_is_not_tried_again():
    model = client([InvalidRequest("no")])
    error, _ = await generate(model)
    assert isinstance(error, InvalidRequest)
    assert model._queue.ended == ["failed"]


async def test_an_engine_that_failed_gets_nothing_more():
    model = client([FIRST])
    await generate(model)
    model._pool.running[0].play(EngineFailed("x"))
    assert model._queue.gone_ids == [("a1", False)]


async def test_an_answer_that_is_wanted_whole_goes_on_wherever_it_was():
    model = client([word(0)], [word(1, usage=Usage(1, 2))])
    task = asyncio.ensure_future(generate(model, whole=True))
    await asyncio.sleep(0.01)
    assert not task.done()
    model._pool.running[0].play(ReplicaGone("in the middle"))
    stream, settled = await task
    assert [d.text async for d in stream] == ["w0 ", "w1 "]
    assert stream.ttft_s < 0.009
    assert model._queue.ended == ["retried", "answered"]
    assert settled == [Usage(1, 2)]


async def test_the_deadline_of_an_answer_that_is_wanted_whole_stops_the_engine():
    model = client([FIRST])
    error, settled = await generate(model, timeout_s=0.05, whole=True)
    assert isinstance(error, DeadlineExceeded)
    assert (model._queue.ended, model._pool.running[0].cancelled) == (["expired"], 1)
    assert len(settled) == 1


async def test_a_client_that_leaves_while_its_whole_answer_is_made_stops_the_engine():
    model = client([FIRST])
    task = asyncio.ensure_future(generate(model, whole=True))
    await asyncio.sleep(0.01)
    task.cancel()
    await task
    assert (model._queue.ended, model._pool.running[0].cancelled) == (["cancelled"], 1)


# --- a first token that is overdue ------------------------------------------------------------------


def overdue_client(*scripts):
    """A model whose first tokens have come quickly so far, and whose budget is full."""
    model = client(*scripts)
    for _ in range(50):
        model._hedging.observe(0.001, 1000)
    return model


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(hedging, "_LEAST_S", 0.02)


async def started(model, count):
    async with asyncio.timeout(2):
        while len(model._pool.running) < count:
            await asyncio.sleep(0.005)


async def test_an_overdue_first_token_is_asked_of_another_replica_and_the_first_to_answer_goes_on():
    model = overdue_client([])
    task = asyncio.ensure_future(generate(model))
    await started(model, 2)
    first, second = model._queue.tickets
    assert (first.avoid, second.avoid, second.request_id) == ("", "a1", "r#2")
    slow, quick = model._pool.running
    quick.play(word(0))
    slow.play(word(9))
    quick.play(word(1, usage=Usage(1, 2)))
    stream, settled = await task
    assert [d.text async for d in stream] == ["w0 ", "w1 "]
    assert (model._queue.ended, settled) == (["cancelled", "answered"], [Usage(1, 2)])
    assert (slow.cancelled, quick.cancelled) == (1, 0)


async def test_a_late_first_token_that_comes_before_the_second_ones_stops_that():
    model = overdue_client([])
    task = asyncio.ensure_future(generate(model))
    await started(model, 2)
    slow, second = model._pool.running
    slow.play(word(0, usage=Usage(1, 1)))
    stream, _ = await task
    assert [d.text async for d in stream] == ["w0 "]
    assert sorted(model._queue.ended) == ["answered", "cancelled"]
    assert (slow.cancelled, second.cancelled) == (0, 1)


async def test_of_two_starts_one_may_fail_and_the_other_goes_on():
    model = overdue_client([])
    task = asyncio.ensure_future(generate(model))
    await started(model, 2)
    slow, second = model._pool.running
    second.play(ReplicaGone("x"))
    slow.play(word(0, usage=Usage(1, 1)))
    await task
    assert model._queue.ended == ["cancelled", "answered"]
    assert len(model._queue.tickets) == 2


async def test_when_both_starts_fail_the_request_comes_back_under_its_own_ticket():
    model = overdue_client([])
    task = asyncio.ensure_future(generate(model))
    await started(model, 2)
    slow, second = model._pool.running
    assert [one.request.request_id for one in (slow, second)] == [
        "r",
        "r#2",
    ]  # as the queue has it in its books
    slow.play(ReplicaGone("x"))
    second.play(ReplicaGone("x"))
    await started(model, 3)
    model._pool.running[2].play(word(0, usage=Usage(1, 1)))
    await task
    assert [ticket.request_id for ticket in model._queue.tickets] == ["r", "r#2", "r"]
    assert model._queue.ended == ["cancelled", "failed", "answered"]


async def test_a_client_that_leaves_stops_both_starts():
    model = overdue_client([])
    task = asyncio.ensure_future(generate(model))
    await started(model, 2)
    task.cancel()
    await task
    assert [one.cancelled for one in model._pool.running] == [1, 1]
    assert model._queue.ended == ["cancelled", "cancelled"]


async def test_without_budget_and_for_batch_nothing_is_started_twice():
    model = overdue_client([])
    model._hedging.spend(model._hedging._budget_tokens)
    task = asyncio.ensure_future(generate(model, timeout_s=0.1))
    await task
    assert len(model._pool.running) == 1
