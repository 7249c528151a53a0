"""`BatchingQueue` in process: connections, the sweeper, and what it says of its load."""

import asyncio

import pytest

from actors import batching_queue
from actors.batching_queue import BatchingQueue, BatchingQueueConfig
from actors.handles import frames
from actors.types import ModelCard, Principal, PriorityClass, Ticket
from tests.unit.fake_serve import settle

CARD = ModelCard(name="m", context_tokens=100, tokenizer="scripted")


@pytest.fixture
async def queue(monkeypatch):
    monkeypatch.setattr(batching_queue, "_SWEEP_S", 0.01)
    queue = BatchingQueue("m", BatchingQueueConfig(look_ahead=0))
    yield queue
    if queue._sweeper is not None:
        queue._sweeper.cancel()


class Gateway:
    def __init__(self, queue, connection="g/0"):
        self.queue, self.connection = queue, connection
        self.stream = queue.grants(connection)

    async def read(self):
        return frames.decode_queue_events(await asyncio.wait_for(anext(self.stream), 1))

    async def send(self, *commands):
        return frames.decode_queue_events(
            await self.queue.send(self.connection, frames.encode(list(commands)))
        )


def submit(request_id, **fields):
    ticket = Ticket(
        request_id=request_id,
        principal=Principal(tenant="t"),
        prompt_tokens=1,
        predicted_output_tokens=1,
        timeout_s=60,
        **fields,
    )
    return frames.Submit(ticket)


async def report(queue, *running, slots=1, replica_id="a"):
    await queue.report(
        frames.encode(frames.Report(replica_id, CARD, slots, 1000, list(running), [0] * len(running), 1.0))
    )


def granted(events):
    return [event.grant.request_id for event in events if isinstance(event, frames.Granted)]


async def test_a_connection_begins_with_the_card_and_hears_when_it_changes(queue):
    gateway = Gateway(queue)
    assert await gateway.read() == [frames.Hello(None)]
    await report(queue)
    assert await gateway.read() == [frames.Hello(CARD)]
    await gateway.stream.aclose()


async def test_where_slots_are_free_the_answer_to_a_frame_is_its_grants(queue):
    one, two = Gateway(queue, "g1"), Gateway(queue, "g2")
    await one.read()
    await two.read()
    await report(queue, slots=4)
    await one.read()
    await two.read()
    assert granted(await one.send(submit("a"), submit("b"))) == ["a", "b"]
    assert granted(await two.send(submit("c"))) == ["c"]


async def test_grants_of_one_tick_are_one_frame_of_the_stream_to_each_gateway(queue):
    one, two = Gateway(queue, "g1"), Gateway(queue, "g2")
    await one.read()
    await two.read()
    assert granted(await one.send(submit("a"), submit("b"))) == []
    assert granted(await two.send(submit("c"))) == []
    await report(queue, slots=4)
    assert granted(await one.read()) == ["a", "b"]
    assert granted(await two.read()) == ["c"]


async def test_a_gateway_that_leaves_frees_what_it_had_for_the_others(queue):
    one, two = Gateway(queue, "g1"), Gateway(queue, "g2")
    await one.read()
    await two.read()
    await report(queue, slots=1)
    assert granted(await one.send(submit("a"), submit("b"))) == ["a"]
    await two.send(submit("c"))
    await one.stream.aclose()
    assert granted(await two.read()) == ["c"]
    assert queue.conservation() == {"accepted": 3, "in_flight": 1, "cancelled": 2}


async def test_tickets_of_a_connection_that_is_not_open_are_left_to_the_next_one(queue):
    gateway = Gateway(queue)
    await gateway.send(submit("a"))
    assert queue.conservation()["accepted"] == 0


async def test_a_replica_that_drains_gets_nothing_new_also_after_it_was_lost_for_one_gateway(queue):
    gateway = Gateway(queue)
    await gateway.read()
    await report(queue, slots=2)
    await gateway.send(frames.Gone("a", draining=True), submit("x"))
    await report(queue, slots=2)
    await settle()
    assert queue.conservation()["in_flight"] == 1
    await report(queue, replica_id="b")
    assert granted(await gateway.read()) == ["x"]


async def test_arrivals_are_forgotten_where_nothing_scales(queue, monkeypatch):
    gateway = Gateway(queue)
    await gateway.read()
    await report(queue)
    await gateway.send(*(submit(f"r{n}") for n in range(50)))
    assert queue.load().arrival_rate_rps == 5
    monkeypatch.setattr(batching_queue, "_RATE_WINDOW_S", 0.01)
    await asyncio.sleep(0.05)
    assert len(queue._arrivals) == 0


async def test_a_ticket_that_comes_back_is_no_arrival(queue):
    gateway = Gateway(queue)
    await gateway.read()
    await gateway.send(submit("a"))
    await gateway.send(submit("a"))
    assert len(queue._arrivals) == 1


async def test_the_sweeper_survives_a_sweep_that_breaks(queue, monkeypatch):
    monkeypatch.setattr(queue, "_publish", lambda _: 1 / 0)
    await report(queue)
    await asyncio.sleep(0.03)
    swept = []
    monkeypatch.setattr(queue, "_publish", swept.append)
    await asyncio.sleep(0.03)
    assert swept


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"class_weights": {"batch": 0}}, "class_weights.batch"),
        ({"class_weights": {"vip": 1}}, "interactive"),
        ({"tenant_weights": {"acme": -2}}, "tenant_weights.acme"),
        ({"tenant_weights": {"acme": float("inf")}}, "tenant_weights.acme"),
    ],
)
def test_weights_that_make_no_order_are_refused_with_their_name(given, named):
    with pytest.raises(ValueError, match=named):
        BatchingQueueConfig.model_validate(given)


async def test_the_configured_weights_decide_between_tenants_and_classes():
    config = BatchingQueueConfig(
        look_ahead=0, tenant_weights={"gold": 3.0}, class_weights={"batch": 2.0, "interactive": 4.0}
    )
    line = BatchingQueue("m", config)._dispatcher.line
    counters = line._classes[PriorityClass.STANDARD].counters
    assert (counters.weight("gold"), counters.weight("other")) == (3.0, 1.0)
    assert line._shares._weights == {"interactive": 4.0, "standard": 30.0, "batch": 2.0}
