"""The gateway's end of the queue: over a real `BatchingQueue`, without Serve."""

import asyncio
import contextvars

import pytest

from actors.batching_queue import BatchingQueue, BatchingQueueConfig
from actors.errors import DeadlineExceeded, Overloaded, Unavailable
from actors.handles import frames, queue
from actors.handles.queue import QueueClient, QueueReporter
from actors.types import ModelCard, Principal, Ticket
from tests.unit.fake_serve import Deployment, settle

CARD = ModelCard(name="m", context_tokens=100, tokenizer="scripted")


def ticket(request_id="r1", timeout_s=30.0, **fields):
    return Ticket(
        request_id=request_id,
        principal=Principal(tenant="t"),
        prompt_tokens=1,
        predicted_output_tokens=1,
        timeout_s=timeout_s,
        **fields,
    )


def new_queue():
    return BatchingQueue("m", BatchingQueueConfig(look_ahead=0))


async def report(actor, *running, slots=1, replica_id="a"):
    sent = frames.Report(replica_id, CARD, slots, 1000, list(running), [0] * len(running), 1.0)
    await actor.report(frames.encode(sent))


class Listener:
    def __init__(self, lost):
        self.lost, self.told = lost, []

    def queue_lost(self):
        self.lost.append(None)

    def preempted(self, request_id):
        self.told.append(("preempted", request_id))

    def replica_silent(self, replica_id):
        self.told.append(("silent", replica_id))


@pytest.fixture
async def served(monkeypatch):
    deployment = Deployment(new_queue())
    monkeypatch.setattr(queue, "deployment_handle", deployment.handle)
    monkeypatch.setattr(queue, "_RECONNECT_S", (0.001, 0.01))
    return deployment


@pytest.fixture
async def lost():
    return []


@pytest.fixture
async def client(served, lost):
    client = QueueClient("m", "g", Listener(lost))
    yield client
    await client.close()


def acquiring(client, *args, **kwargs):
    return asyncio.ensure_future(client.acquire(ticket(*args, **kwargs)))


async def test_a_grant_reaches_the_request_that_asked(client, served):
    await report(served.actor)
    grant = await client.acquire(ticket())
    assert (grant.request_id, grant.replica_id) == ("r1", "a")
    assert client.card == CARD


async def test_waiting_tickets_survive_the_death_of_their_queue(client, served, lost):
    await report(served.actor, slots=1)
    await client.acquire(ticket("running"))
    waiting = [acquiring(client, f"w{n}") for n in range(3)]
    await settle()
    served.kill()
    await settle()
    assert lost
    served.revive(new_queue())
    await asyncio.sleep(0.1)
    await report(served.actor, "running", slots=4)
    assert {(await one).request_id for one in waiting} == {"w0", "w1", "w2"}
    assert served.actor.conservation() == {"accepted": 4, "in_flight": 4}


@pytest.mark.parametrize("error", [asyncio.CancelledError(), RuntimeError("odd")])
async def test_a_connection_that_the_other_end_cancels_is_opened_again(client, served, lost, error):
    waiting = acquiring(client)
    await settle()
    served.break_streams(error)
    await asyncio.sleep(0.05)
    await report(served.actor)
    assert (await asyncio.wait_for(waiting, 1)).replica_id == "a"
    assert lost


async def test_a_queue_that_ends_its_stream_is_looked_after_too(client, served, lost):
    waiting = acquiring(client)
    await settle()
    for gateway in served.actor._gateways.values():
        gateway.close()
    await asyncio.sleep(0.05)
    assert lost
    await report(served.actor)
    await asyncio.wait_for(waiting, 1)


async def test_a_ticket_is_not_lost_when_the_old_connection_ends_after_the_new_one_began(client, served):
    waiting = acquiring(client)
    await settle()
    [old] = served.actor._gateways
    served.streams[0].fail = lambda _: None  # the queue hears late that the gateway gave it up
    client._reconnect(client._connection)
    await asyncio.sleep(0.05)
    assert len(served.actor._gateways) == 2
    served.actor._gateways.pop(old).close()
    served.actor._deliver(served.actor._dispatcher.gateway_gone(old, 0.0))
    await report(served.actor)
    assert (await asyncio.wait_for(waiting, 1)).request_id == "r1"


async def test_a_client_that_leaves_gives_its_place_up(client, served):
    waiting = acquiring(client)
    await settle()
    assert served.actor.conservation()["in_flight"] == 1
    waiting.cancel()
    await settle()
    assert served.actor.conservation() == {"accepted": 1, "in_flight": 0, "cancelled": 1}


async def test_a_grant_that_meets_a_cancellation_is_given_back(client, served):
    waiting = acquiring(client)
    await settle()
    await report(served.actor)
    while not client._pending["r1"].answer.done():
        await asyncio.sleep(0)
    waiting.cancel()
    await settle()
    assert waiting.cancelled()
    assert served.actor.conservation() == {"accepted": 1, "in_flight": 0, "cancelled": 1}


async def test_the_deadline_ends_the_wait(client, served):
    with pytest.raises(DeadlineExceeded):
        await client.acquire(ticket(timeout_s=0.05, returning=True))
    await settle()
    assert served.actor.conservation() == {"accepted": 1, "in_flight": 0, "expired": 1}


async def test_a_refusal_carries_its_retry_after(client, served):
    with pytest.raises(Overloaded) as refused:  # no replica: 10 s until one has started
        await client.acquire(ticket(timeout_s=5.0))
    assert refused.value.retry_after_s > 5


async def test_what_was_in_line_is_not_refused_by_the_next_queue(client, served):
    await report(served.actor, "other", slots=1)
    waiting = acquiring(client, timeout_s=5.0)
    await settle()
    served.kill()
    served.revive(new_queue())  # knows no replica yet, and so predicts a start-up of 10 s
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await report(served.actor, slots=1)
    await asyncio.wait_for(waiting, 1)


async def test_commands_that_were_lost_bring_a_new_connection(client, served):
    waiting = acquiring(client)
    await settle()
    first = client._connection

    def fails_once(method):
        if method == "send":
            served.before_call = lambda _: None
            raise RuntimeError("odd")

    served.before_call = fails_once
    second = acquiring(client, "r2")
    await asyncio.sleep(0.05)
    assert client._connection not in (None, first)
    await report(served.actor, slots=2)
    await asyncio.wait_for(asyncio.gather(waiting, second), 1)


async def test_a_queue_that_says_nothing_is_given_up(client, served, lost, monkeypatch):
    monkeypatch.setattr(queue, "_HELLO_TIMEOUT_S", 0.02)
    served.kill()
    waiting = acquiring(client)
    await asyncio.sleep(0.1)
    assert len(lost) > 1
    waiting.cancel()


async def test_who_waits_for_a_model_that_is_removed_is_told_and_who_comes_later_too(client, served):
    waiting = acquiring(client)
    await settle()
    await client.close()
    with pytest.raises(Unavailable):
        await waiting
    with pytest.raises(Unavailable):
        await client.acquire(ticket())
    assert client._runner is None


async def test_the_connection_and_its_commands_belong_to_no_request(client, served):
    request = contextvars.ContextVar("request", default=None)
    seen = []
    served.before_call = lambda method: seen.append((method, request.get()))
    request.set("the first request")
    waiting = acquiring(client)
    await settle()
    waiting.cancel()
    await settle()
    assert {method for method, _ in seen} == {"grants", "send"}
    assert {found for _, found in seen} == {None}


async def test_a_reporter_says_that_the_queue_is_away_whatever_happened(served):
    served.before_call = lambda _: (_ for _ in ()).throw(asyncio.CancelledError())
    with pytest.raises(Unavailable):
        await QueueReporter("m").report(frames.Report("a", CARD, 1, 1000, [], [], 1.0))


async def test_a_replica_that_was_lost_while_the_queue_was_away_is_told_of_on_the_next_connection(
    client, served
):
    await report(served.actor, slots=1, replica_id="dead")
    await client.acquire(ticket("r1"))
    served.break_streams()
    await settle()
    client.gone("dead")
    client.end("r1", "retried")
    await asyncio.sleep(0.05)
    await report(served.actor, slots=1, replica_id="b")
    grant = await client.acquire(ticket("r1", returning=True))
    assert grant.replica_id == "b"
