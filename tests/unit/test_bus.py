"""The gateway's end of the bus: over a real `LLMReplica` or a fake one, without Serve."""

import asyncio
import contextvars

import pytest

from actors.errors import InvalidRequest, PayloadTooLarge, ReplicaGone
from actors.handles import frames, llm
from actors.handles.llm import ReplicaPool
from actors.handles.outbox import Outbox
from actors.handles.replica_directory import ReplicaDirectory
from actors.types import GenerationRequest, TokenDelta, Tool, Usage
from tests.unit.fake_serve import Deployment, Gone, settle


class Replica:
    """What a gateway sees of a replica: it notes commands, tests send the tokens."""

    def __init__(self):
        self.started, self.aborted, self.frames = {}, [], []
        self.outbox = Outbox()
        self.open = 0
        self.says_hello = True

    async def bus(self, connection, *, replica):
        self.open += 1
        try:
            if not self.says_hello:
                await asyncio.Event().wait()
            yield frames.encode([])
            async for events in self.outbox.batches():
                yield frames.encode(events)
        finally:
            self.open -= 1

    async def send(self, connection, frame, *, replica):
        self.frames.append(frame)
        for command in frames.decode_replica_commands(frame):
            if isinstance(command, frames.Abort):
                self.aborted.append(command.stream)
            else:
                self.started[frames.decode_request(command.request).request_id] = command.stream

    def tokens(self, request_id, text, *, last=False):
        usage = Usage(1, 1) if last else None
        delta = TokenDelta(0, text, usage=usage)
        self.outbox.put(frames.StreamEvent(self.started[request_id], delta))


class Owner:
    def __init__(self):
        self.lost, self.draining = [], []

    def replica_lost(self, replica_id):
        self.lost.append(replica_id)

    def replica_draining(self, replica_id):
        self.draining.append(replica_id)


class Sink:
    """Where a stream's tokens go, as a generation's attempt is."""

    def __init__(self):
        self.deltas, self.errors, self.ended = [], [], False

    def push(self, delta):
        self.deltas.append(delta.text)
        self.ended = delta.usage is not None

    def end(self, error):
        self.errors.append(type(error))
        self.ended = True


def request(request_id="r1", **fields):
    return GenerationRequest(request_id=request_id, **({"prompt": "hello"} | fields))


@pytest.fixture
async def replica():
    return Replica()


@pytest.fixture
async def served(replica, monkeypatch):
    deployment = Deployment(replica)
    monkeypatch.setattr(llm, "deployment_handle", deployment.handle)
    return deployment


@pytest.fixture
async def directory(monkeypatch):
    directory = ReplicaDirectory()
    directory.update("m", frozenset({"a", "b"}))
    monkeypatch.setattr(llm, "DIRECTORY", directory)
    return directory


@pytest.fixture
async def owner():
    return Owner()


@pytest.fixture
async def pool(served, directory, owner):
    pool = ReplicaPool("m", "g", owner)
    yield pool
    pool.close()
    await settle()


async def start(pool, request_id="r1", replica_id="a", **fields):
    sink = Sink()
    running = await pool.start(replica_id, request(request_id, **fields), 1, sink)
    await settle()
    return running, sink


async def test_tokens_come_to_the_stream_that_asked(pool, replica):
    _, one = await start(pool, "one")
    _, two = await start(pool, "two")
    replica.tokens("two", "b", last=True)
    replica.tokens("one", "a", last=True)
    await settle()
    assert (one.deltas, two.deltas) == (["a"], ["b"])
    assert (one.errors, two.errors) == ([], [])
    assert replica.open == 1


async def test_a_bus_that_breaks_ends_each_of_its_streams_with_one_error(pool, replica, served, owner):
    streams = [await start(pool, f"r{n}") for n in range(3)]
    replica.tokens("r0", "a")
    await settle()
    served.break_streams()
    await settle()
    assert [sink.errors for _, sink in streams] == [[ReplicaGone]] * 3
    assert streams[0][1].deltas == ["a"]
    assert owner.lost == ["a"]


async def test_a_bus_that_the_other_end_cancels_is_broken_too(pool, served, owner):
    _, sink = await start(pool)
    served.break_streams(asyncio.CancelledError())
    await settle()
    assert sink.errors == [ReplicaGone]
    assert owner.lost == ["a"]


async def test_a_handle_that_raises_is_a_lost_replica(pool, served, owner, monkeypatch):
    def broken(*_args, **_kwargs):
        raise Gone

    monkeypatch.setattr("tests.unit.fake_serve.Handle.remote", broken)
    with pytest.raises(ReplicaGone):
        await pool.start("a", request(), 1, Sink())
    assert owner.lost == ["a"]


async def test_the_bus_and_its_commands_belong_to_no_request(pool, served):
    current = contextvars.ContextVar("request", default=None)
    seen = []
    served.before_call = lambda method: seen.append((method, current.get()))
    current.set("the first request")
    await start(pool)
    assert seen == [("bus", None), ("send", None)]


async def test_a_request_that_cannot_be_sent_fails_alone(pool, replica):
    poison = Tool(name="f", parameters={"maximum": 10**30})
    good = asyncio.ensure_future(start(pool, "good"))
    with pytest.raises(InvalidRequest):
        await start(pool, "bad", tools=(poison,))
    _, sink = await good
    replica.tokens("good", "a", last=True)
    await settle()
    assert sink.deltas == ["a"]


async def test_what_starts_in_one_tick_is_cut_into_frames_that_grpc_takes(pool, replica):
    text = "x" * 100_000
    await start(pool)
    await asyncio.gather(*(pool.start("a", request(f"q{n}", prompt=text), 1, Sink()) for n in range(60)))
    await settle()
    assert len(replica.started) == 61
    assert max(map(len, replica.frames)) < 4 << 20
    assert len(replica.frames) == 3
    with pytest.raises(PayloadTooLarge):
        await pool.start("a", request("huge", prompt="x" * (4 << 20)), 1, Sink())


async def test_a_bus_that_does_not_open_is_given_up_and_the_next_request_tries_another(
    pool, replica, owner, monkeypatch
):
    monkeypatch.setattr(llm, "_OPEN_TIMEOUT_S", 0.02)
    replica.says_hello = False
    with pytest.raises(ReplicaGone):
        await pool.start("a", request(), 1, Sink())
    await settle()
    assert (replica.open, owner.lost) == (0, ["a"])
    replica.says_hello = True
    await start(pool)


async def test_commands_that_were_lost_end_their_streams_only(pool, served, replica, owner):
    _, first = await start(pool, "first")

    def fails_once(method):
        served.before_call = lambda _: None
        raise Gone

    served.before_call = fails_once
    _, second = await start(pool, "second")
    assert second.errors == [ReplicaGone]
    await settle()
    assert len(replica.aborted) == 1  # it may have arrived all the same
    replica.tokens("first", "a", last=True)
    await settle()
    assert first.deltas == ["a"]
    assert owner.lost == []


async def test_a_send_that_finds_the_replica_dead_or_its_end_of_the_bus_closed_breaks_the_bus(
    pool, served, owner
):
    _, first = await start(pool, "first")

    def refuses(_method):
        raise ReplicaGone("the bus is not open")

    served.before_call = refuses
    _, second = await start(pool, "second")
    assert (first.errors, second.errors, owner.lost) == ([ReplicaGone], [ReplicaGone], ["a"])


async def leave(directory, *left):
    directory.update("m", frozenset(left))
    await settle()


async def test_an_idle_bus_closes_when_its_replica_leaves_the_router(pool, replica, directory, owner):
    await start(pool)
    replica.tokens("r1", "a", last=True)
    await settle()
    assert replica.open == 1
    await leave(directory, "b")
    assert (replica.open, owner.draining, owner.lost) == (0, ["a"], [])


@pytest.mark.parametrize("how", ["answered", "cancelled", "failed"])
async def test_a_draining_replica_gets_rid_of_its_bus_however_its_last_stream_ends(
    pool, replica, directory, owner, how
):
    running, _ = await start(pool)
    await leave(directory, "b")
    assert replica.open == 1
    if how == "answered":
        replica.tokens("r1", "a", last=True)
    elif how == "cancelled":
        running.cancel()
    else:
        number = replica.started["r1"]
        replica.outbox.put(frames.StreamEvent(number, None, ReplicaGone("x").to_wire()))
    await settle()
    assert (replica.open, owner.lost) == (0, [])


async def test_a_late_grant_for_a_draining_replica_is_refused_at_once_and_its_queue_is_told(
    pool, directory, owner, replica
):
    await start(pool)
    await leave(directory, "b")
    owner.draining.clear()
    with pytest.raises(ReplicaGone):
        await pool.start("a", request("late"), 1, Sink())
    assert owner.draining == ["a"]
    assert list(replica.started) == ["r1"]


async def test_a_replica_that_no_router_has_heard_of_yet_has_not_left(directory):
    assert not directory.has_left("m", "new")
    directory.update("m", frozenset({"new"}))
    assert not directory.has_left("m", "new")
    assert directory.has_left("m", "a")


async def test_news_of_others_says_nothing_of_a_replica_that_the_router_has_not_heard_of_yet(
    pool, directory, owner, replica
):
    _, sink = await start(pool, replica_id="new")
    await leave(directory, "a", "b", "another")
    assert (replica.open, owner.draining, sink.errors) == (1, [], [])
    replica.tokens("r1", "a", last=True)
    await settle()
    await leave(directory, "a", "b")
    assert (replica.open, owner.draining, owner.lost) == (1, [], [])


async def test_a_cancelled_stream_is_aborted_and_its_late_tokens_go_nowhere(pool, replica):
    running, sink = await start(pool)
    running.cancel()
    running.cancel()
    await settle()
    assert replica.aborted == [replica.started["r1"]]
    replica.tokens("r1", "late")
    await settle()
    assert sink.deltas == []


async def test_a_silent_replica_is_given_up_and_its_streams_end_at_once(pool, replica, owner):
    _, sink = await start(pool)
    pool.give_up("a")
    pool.give_up("unknown")
    await settle()
    assert (sink.errors, owner.lost, replica.open) == ([ReplicaGone], ["a"], 0)
