"""The queue actor's object alone, no cluster: what a ticket costs it, and what a waiting one weighs.

    python -m tests.benchmarks.queue [--quick] [--json FILE]

A ticket's way is submit → grant → end, through the same frames that gateways send and read, `PER_FRAME` commands in
each. With 1 and 64 replicas of 64 slots, nobody or 10,000 tickets in line, of 1 or 1,000 tenants. Processor time of
this process, medians over rounds. The baseline puts and gets as many tickets through an `asyncio.PriorityQueue` that
holds as many: it knows no classes, tenants, deadlines, replicas or credit. `frames_share` is what encoding and
decoding the same frames takes of the whole.
"""

import asyncio
import gc
import itertools
import statistics
import time
import tracemalloc
from collections import deque
from dataclasses import dataclass

import msgspec

from actors.batching_queue import BatchingQueue, BatchingQueueConfig
from actors.handles import frames
from actors.types import Grant, ModelCard, Principal, Ticket
from tests.benchmarks.report import Row, parser, publish

SLOTS = 64  # of each replica
PER_FRAME = 4  # as many as were seen in one frame at 16 clients
WAITING = 10_000
CONNECTION = "gateway"
CARD = ModelCard(name="m", context_tokens=8192, tokenizer="scripted")
# Nobody reports while the clock runs, and nobody is to be refused.
CONFIG = BatchingQueueConfig(silent_after_s=1e6, dead_after_s=1e6)
PATIENCE_S = 1e6


@dataclass(frozen=True)
class Case:
    """How large the queue is."""

    replicas: int
    waiting: int
    tenants: int

    def __str__(self) -> str:
        return f"r{self.replicas}_w{_short(self.waiting)}_t{_short(self.tenants)}"


def _short(number: int) -> str:
    return f"{number // 1000}k" if number >= 1000 else str(number)


CASES = [
    Case(replicas, waiting, tenants) for replicas in (1, 64) for waiting in (0, WAITING) for tenants in (1, 1000)
]  # fmt: skip


class Tickets:
    """Tickets of so many tenants in turn, each with an id of its own."""

    def __init__(self, tenants: int) -> None:
        self._principals = [Principal(tenant=f"tenant-{number}") for number in range(tenants)]
        self._numbers = itertools.count()

    def take(self) -> Ticket:
        number = next(self._numbers)
        return Ticket(
            request_id=f"chatcmpl-{number:024x}",
            principal=self._principals[number % len(self._principals)],
            prompt_tokens=100,
            predicted_output_tokens=128,
            timeout_s=PATIENCE_S,
            prefix=(number,),
        )

    def submits(self, count: int) -> list[frames.QueueCommand]:
        return [frames.Submit(self.take()) for _ in range(count)]


class Gateway:
    """The other end of a queue: sends frames, reads grants."""

    def __init__(self, queue: BatchingQueue) -> None:
        self._queue = queue
        self._reader = asyncio.create_task(self._read())
        self._came = asyncio.Event()
        self.granted: deque[str] = deque()

    async def send(self, commands: list[frames.QueueCommand]) -> None:
        self._take(await self._queue.send(CONNECTION, frames.encode(commands)))

    async def grants(self, count: int) -> None:
        """Until so many grants are at hand."""
        while len(self.granted) < count:
            self._came.clear()
            await self._came.wait()

    async def leave(self) -> None:
        self._reader.cancel()
        await asyncio.wait([self._reader])

    async def _read(self) -> None:
        async for frame in self._queue.grants(CONNECTION):
            self._take(frame)

    def _take(self, frame: bytes) -> None:
        for event in frames.decode_queue_events(frame):
            if isinstance(event, frames.Granted):
                self.granted.append(event.grant.request_id)
                self._came.set()
            elif isinstance(event, frames.Refused):
                raise RuntimeError(f"refused: {event.error}")  # noqa: TRY004  nothing is of a wrong type


async def filled(case: Case, tickets: Tickets) -> tuple[BatchingQueue, Gateway]:
    """A queue with its replicas, and with its tickets running and waiting."""
    queue = BatchingQueue("m", CONFIG)
    for number in range(case.replicas):
        report = frames.Report(f"replica-{number}", CARD, SLOTS, 1 << 30, [], [], 1.0)
        await queue.report(frames.encode(report))
    gateway = Gateway(queue)
    await asyncio.sleep(0)  # its stream of grants is open
    if case.waiting:
        places = case.replicas * (SLOTS + CONFIG.look_ahead)
        await gateway.send(tickets.submits(places))
        await gateway.grants(places)
        for _ in range(case.waiting // 100):
            await gateway.send(tickets.submits(100))
    return queue, gateway


async def us_per_ticket(case: Case, count: int) -> float:
    """Processor time of a ticket's whole way, in a queue that stays as full as it is."""
    tickets = Tickets(case.tenants)
    _, gateway = await filled(case, tickets)
    gc.collect()
    started = time.process_time()
    for _ in range(count // PER_FRAME):
        commands = tickets.submits(PER_FRAME)
        if not case.waiting:  # there is room: a grant comes at once
            await gateway.send(commands)
            await gateway.grants(PER_FRAME)
            commands = []
        ends = [frames.End(gateway.granted.popleft(), "answered", 128) for _ in range(PER_FRAME)]
        await gateway.send([*ends, *commands])
        if case.waiting:  # each end has let the next one in
            await gateway.grants(PER_FRAME)
    spent_s = time.process_time() - started
    await gateway.leave()
    return 1e6 * spent_s / (count // PER_FRAME * PER_FRAME)


async def baseline_us_per_ticket(waiting: int, count: int) -> float:
    """The same number of puts and gets, in a queue that knows one order."""
    tickets = Tickets(1)
    queue: asyncio.PriorityQueue[tuple[float, int, Ticket]] = asyncio.PriorityQueue()
    for number in range(waiting):
        queue.put_nowait((time.monotonic(), number, tickets.take()))
    gc.collect()
    started = time.process_time()
    for number in range(waiting, waiting + count):
        await queue.put((time.monotonic(), number, tickets.take()))
        await queue.get()
    return 1e6 * (time.process_time() - started) / count


def frames_us_per_ticket(count: int) -> float:
    """Encoding and decoding what one ticket adds to the frames of its way."""
    tickets = Tickets(1)
    ends: list[frames.QueueCommand] = [
        frames.End(f"chatcmpl-{n:024x}", "answered", 128) for n in range(PER_FRAME)
    ]
    grant = Grant(request_id=f"chatcmpl-{1:024x}", replica_id="replica-1", waited_s=0.1)
    grants = [frames.Granted(grant) for _ in range(PER_FRAME)]
    commands = [tickets.submits(PER_FRAME) for _ in range(count // PER_FRAME)]
    started = time.process_time()
    for submits in commands:
        frames.decode_queue_commands(frames.encode([*ends, *submits]))
        frames.decode_queue_events(frames.encode(grants))
    return 1e6 * (time.process_time() - started) / (len(commands) * PER_FRAME)


async def waiting_mb(tenants: int) -> tuple[float, float]:
    """Memory of `WAITING` tickets in line, and in an `asyncio.PriorityQueue`."""
    tickets = Tickets(tenants)
    _, gateway = await filled(Case(1, 100, tenants), tickets)
    plain: asyncio.PriorityQueue[tuple[float, int, Ticket]] = asyncio.PriorityQueue()
    gc.collect()
    tracemalloc.start()
    for _ in range(WAITING // 100):
        await gateway.send(tickets.submits(100))
    gc.collect()
    ours = tracemalloc.get_traced_memory()[0]
    for number in range(WAITING):  # as they come off the wire: each its own
        ticket = msgspec.msgpack.decode(msgspec.msgpack.encode(tickets.take()), type=Ticket)
        plain.put_nowait((time.monotonic(), number, ticket))
    gc.collect()
    theirs = tracemalloc.get_traced_memory()[0] - ours
    tracemalloc.stop()
    await gateway.leave()
    return ours / 1e6, theirs / 1e6


async def rows(rounds: int, count: int) -> list[Row]:
    found = []
    name = "asyncio.PriorityQueue"
    plain = {
        waiting: statistics.median([await baseline_us_per_ticket(waiting, count) for _ in range(rounds)])
        for waiting in (0, WAITING)
    }
    framing = statistics.median([frames_us_per_ticket(count) for _ in range(rounds)])
    for case in CASES:
        us = statistics.median([await us_per_ticket(case, count) for _ in range(rounds)])
        beside = plain[case.waiting]
        found += [
            Row(name=f"queue_grants_per_s_{case}", value=1e6 / us, unit="1/s", baseline=name,
                baseline_value=1e6 / beside),
            Row(name=f"queue_us_per_ticket_{case}", value=us, unit="µs", baseline=name, baseline_value=beside),
            Row(name=f"queue_frames_share_{case}", value=framing / us, unit="of the ticket's µs"),
        ]  # fmt: skip
    found.append(Row(name="queue_frames_us_per_ticket", value=framing, unit="µs"))
    for tenants in (1, 1000):
        ours, theirs = await waiting_mb(tenants)
        row = f"queue_mb_per_10k_waiting_t{_short(tenants)}"
        found.append(Row(name=row, value=ours, unit="MB", baseline=name, baseline_value=theirs))
    return found


def main() -> None:
    chosen = parser(__doc__.partition("\n")[0]).parse_args()
    rounds, count = (1, 2000) if chosen.quick else (5, 20_000)
    publish(f"The queue alone, {SLOTS} slots a replica", asyncio.run(rows(rounds, count)), chosen.json)


if __name__ == "__main__":
    main()
