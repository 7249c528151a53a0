"""`LLMReplica` in process: its bus, its commands and its reports, without Serve."""

import asyncio
from types import SimpleNamespace

import msgspec
import pytest

from actors import llm_replica
from actors.engines.choice import EngineChoice
from actors.engines.gpu_share import SharedCardEngine
from actors.engines.protocol import EngineCapacity, EngineStats
from actors.errors import EngineFailed, Unavailable, from_wire
from actors.handles import frames
from actors.llm_replica import LLMReplica
from actors.types import GenerationRequest, ModelCard, TokenDelta, Usage
from tests.unit.fake_serve import settle

CARD = ModelCard(name="m", context_tokens=100, tokenizer="scripted")
LAST = TokenDelta(0, "b", usage=Usage(1, 2))


class Engine:
    """Yields what tests put in; closing a generator is an abort."""

    def __init__(self):
        self.requests, self.aborted = {}, []
        self.broken = None
        self.hangs = False

    async def start(self):
        return CARD

    @property
    def capacity(self):
        if self.broken:
            raise self.broken
        return EngineCapacity(max_sequences=4, kv_tokens=100)

    async def generate(self, request):
        queue = self.requests[request.request_id] = asyncio.Queue()
        try:
            while (item := await queue.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        except asyncio.CancelledError:
            self.aborted.append(request.request_id)
            raise

    def stats(self):
        return EngineStats(
            running=0,
            waiting=0,
            kv_usage=0,
            prompt_tokens_total=0,
            output_tokens_total=0,
            preemptions_total=0,
        )

    async def check_health(self):
        if self.hangs:
            raise EngineFailed("no step for 8 s")

    async def stop(self):
        pass


class Reporter:
    def __init__(self, _app_name):
        self.reports, self.error = [], None

    async def report(self, report):
        self.reports.append(report)
        if self.error:
            raise self.error


class Replica(LLMReplica):
    def __del__(self):  # Serve awaits the real one; the garbage collector cannot
        pass


@pytest.fixture
async def engine():
    return Engine()


@pytest.fixture
async def replica(engine, monkeypatch):
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="a"), app_name="m")
    monkeypatch.setattr(llm_replica.serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(llm_replica, "QueueReporter", Reporter)
    monkeypatch.setattr(llm_replica, "_REPORT_S", 0.01)
    monkeypatch.setattr(llm_replica, "_WATCH_S", 0.01)
    monkeypatch.setattr(EngineChoice, "build", lambda *_: engine)
    replica = Replica.__new__(Replica)
    await replica.__init__("m", EngineChoice(scripted={}), None)
    yield replica
    await LLMReplica.__del__(replica)


class Bus:
    """A gateway's end."""

    def __init__(self, replica, connection="g/0"):
        self.replica, self.connection = replica, connection
        self.stream = replica.bus(connection, replica="a")

    async def open(self):
        assert frames.decode_stream_events(await anext(self.stream)) == []
        return self

    async def read(self):
        return frames.decode_stream_events(await asyncio.wait_for(anext(self.stream), 1))

    async def send(self, *commands):
        await self.replica.send(self.connection, frames.encode(list(commands)), replica="a")
        await settle()


@pytest.fixture
async def bus(replica):
    bus = await Bus(replica).open()
    yield bus
    await bus.stream.aclose()


def start(stream, request_id):
    request = GenerationRequest(request_id=request_id, prompt="x")
    return frames.Start(stream, frames.encode_request(request))


def running(replica):
    return sorted(one.request_id for one in replica._running.values())


async def test_one_step_of_all_streams_is_one_frame(bus, engine, replica):
    await bus.send(start(1, "one"), start(2, "two"))
    assert running(replica) == ["one", "two"]
    for queue in engine.requests.values():
        queue.put_nowait(LAST)
    assert await bus.read() == [frames.StreamEvent(1, LAST), frames.StreamEvent(2, LAST)]


async def test_an_abort_that_overtakes_its_start_still_wins(bus, engine, replica):
    await bus.send(frames.Abort(1))
    await bus.send(start(1, "one"))
    assert (engine.requests, running(replica)) == ({}, [])
    assert replica._connections["g/0"].aborted == set()


async def test_aborts_of_streams_that_ended_are_forgotten(bus, engine, replica, monkeypatch):
    monkeypatch.setattr(llm_replica, "_OVERTAKEN_S", 0.02)
    for number in range(10):
        await bus.send(frames.Abort(number))
    await asyncio.sleep(0.05)
    assert replica._connections["g/0"].aborted == set()


async def test_an_abort_stops_the_engine_and_nothing_else(bus, engine, replica):
    await bus.send(start(1, "one"), start(2, "two"))
    await bus.send(frames.Abort(1))
    assert engine.aborted == ["one"]
    assert running(replica) == ["two"]


async def test_the_end_of_a_bus_cancels_its_streams_and_no_others(replica, engine):
    one, two = await Bus(replica, "g1").open(), await Bus(replica, "g2").open()
    await one.send(start(1, "one"))
    await two.send(start(1, "two"))
    await one.stream.aclose()
    await settle()
    assert (engine.aborted, running(replica)) == (["one"], ["two"])
    with pytest.raises(Unavailable):
        await one.send(start(2, "late"))
    await two.stream.aclose()


@pytest.mark.parametrize("before", [[], [TokenDelta(0, "a")]])
async def test_an_engine_that_ends_without_a_last_delta_is_an_error_and_no_silence(bus, engine, before):
    await bus.send(start(1, "one"))
    for item in (*before, None):
        engine.requests["one"].put_nowait(item)
    *_, last = await bus.read()
    assert last.error["code"] == "internal_error"


async def test_an_engine_that_breaks_tells_its_caller_and_then_the_health_check(bus, engine, replica):
    await bus.send(start(1, "one"), start(2, "two"))
    engine.requests["one"].put_nowait(ValueError("a bug"))
    [event] = await bus.read()
    assert "bug" not in event.error["message"]
    await replica.check_health()
    engine.requests["two"].put_nowait(EngineFailed("dead"))
    [event] = await bus.read()
    assert isinstance(from_wire(event.error), EngineFailed)
    with pytest.raises(EngineFailed):
        await replica.check_health()


async def test_streams_of_an_engine_that_hangs_fail_before_serve_replaces_it(
    bus, engine, replica, monkeypatch
):
    monkeypatch.setattr(llm_replica, "_WATCH_S", 0.01)
    await bus.send(start(1, "one"), start(2, "two"))
    engine.hangs = True
    events = await bus.read()
    assert [type(from_wire(event.error)) for event in events] == [EngineFailed, EngineFailed]
    await settle()
    assert (sorted(engine.aborted), running(replica)) == (["one", "two"], [])
    with pytest.raises(EngineFailed):
        await replica.check_health()


async def test_a_request_that_cannot_be_read_fails_alone(bus, engine, replica):
    wrong = frames.Start(1, msgspec.Raw(frames.encode({"request_id": 5})))
    await bus.send(wrong, start(2, "good"))
    [event] = await bus.read()
    assert (event.stream, event.error["code"]) == (1, "invalid_request")
    assert running(replica) == ["good"]


@pytest.mark.parametrize("error", [Unavailable("away"), RuntimeError("odd"), None])
async def test_reports_go_on_whatever_happens_to_one_of_them(replica, engine, error):
    if error is None:
        engine.broken = EngineFailed("its capacity cannot be told")
    replica._reporter.error = error
    await asyncio.sleep(0.05)
    engine.broken = replica._reporter.error = None
    before = len(replica._reporter.reports)
    await asyncio.sleep(0.05)
    assert len(replica._reporter.reports) > before


async def test_a_report_lists_what_runs_until_it_has_ended(bus, engine, replica):
    await bus.send(start(1, "one"))
    await asyncio.sleep(0.03)
    assert replica._reporter.reports[-1].running == ["one"]
    for item in (LAST, None):
        engine.requests["one"].put_nowait(item)
    await asyncio.sleep(0.03)
    assert replica._reporter.reports[-1].running == []


# --- an engine that is started again in place ------------------------------------------------------------


class Shared(Engine, SharedCardEngine):
    """One that shares a card: each recovery waits for what tests say of it."""

    asleep = False

    def __init__(self):
        super().__init__()
        self.recoveries = asyncio.Queue()

    async def recover(self):
        said = await self.recoveries.get()
        if isinstance(said, Exception):
            raise said
        return said


@pytest.fixture
def shared():
    return Shared()


@pytest.fixture
async def sharing(shared, monkeypatch):
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="a"), app_name="m")
    monkeypatch.setattr(llm_replica.serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(llm_replica, "QueueReporter", Reporter)
    monkeypatch.setattr(llm_replica, "_REPORT_S", 0.01)
    monkeypatch.setattr(EngineChoice, "build", lambda *_: shared)
    replica = Replica.__new__(Replica)
    await replica.__init__("m", EngineChoice(scripted={}), None)
    yield replica
    await LLMReplica.__del__(replica)


async def reports_come(replica):
    before = len(replica._reporter.reports)
    await asyncio.sleep(0.05)
    return len(replica._reporter.reports) > before + 1


async def die(replica, engine):
    bus = await Bus(replica).open()
    await bus.send(start(1, "r"))
    await engine.requests["r"].put(EngineFailed("out of memory"))
    (event,) = await bus.read()
    assert from_wire(event.error).code == "engine_failed"
    await bus.stream.aclose()


async def test_an_engine_on_a_share_comes_back_in_place_and_gets_no_work_meanwhile(sharing, shared):
    await die(sharing, shared)
    await sharing.check_health()  # Serve leaves it alone
    assert not await reports_come(sharing)
    await shared.recoveries.put(EngineFailed("the memory is not free yet"))
    assert not await reports_come(sharing)
    await shared.recoveries.put(True)  # noqa: FBT003  what `recover` says
    assert await reports_come(sharing)
    await die(sharing, shared)  # and again
    assert not await reports_come(sharing)


async def test_a_quarantined_engine_stays_down_and_is_not_replaced(sharing, shared):
    await die(sharing, shared)
    await shared.recoveries.put(False)  # noqa: FBT003  as above
    assert not await reports_come(sharing)
    await sharing.check_health()
