"""The load generator: a process of its own, so that its cost is nobody's, and cheap enough never to be the limit.

    python -m tests.benchmarks.load < SPEC        (one line of JSON, see `Spec`)

`measured.drive` starts it. It speaks HTTP/1.1 over bare asyncio protocols with httptools and looks into answers
only when the clock has stopped. On stdout it writes one JSON line when counting begins, one when it ends and one
with the result; the parent reads processor times at the first two.

Closed loop (`window_s` and `warm_up_s`): every client has one unary request open at all times. Streams
(`streams` true): every client sends one streamed request at the same time; counted is the whole, or from
`warm_up_s` on for `window_s` where the streams are paced.
"""

import asyncio
import hashlib
import json
import resource
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import httptools
import msgspec
import uvloop

_EVENT = b"data: "


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What is asked, how often."""

    host: str
    port: int
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    clients: int
    streams: bool
    warm_up_s: float
    window_s: float | None  # None: streams are counted from their start to their end

    def request(self) -> bytes:
        """The bytes of one request."""
        body = json.dumps(self.body).encode()
        headers = {
            "host": f"{self.host}:{self.port}",
            "content-type": "application/json",
            "content-length": str(len(body)),
            **self.headers,
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f"POST {self.path} HTTP/1.1\r\n{head}\r\n".encode() + body


class Connection(asyncio.Protocol):
    """One connection, one request at a time; also httptools' callbacks."""

    def __init__(self) -> None:
        self.body: list[bytes] = []
        self.events = 0  # lines of data in the current answer, `[DONE]` among them
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[None] | None = None

    def ask(self, request: bytes) -> asyncio.Future[None]:
        """Send a request; done with the end of the answer, which is in `body` until the next one."""
        self.body, self.events = [], 0
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._done

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(ConnectionError(f"the server closed the connection: {exc}"))

    def on_body(self, body: bytes) -> None:
        self.body.append(body)
        self.events += body.count(_EVENT)

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if status == 200:
            self._done.set_result(None)
        else:
            self._done.set_exception(ConnectionError(f"status {status}: {b''.join(self.body)[:500]!r}"))


async def closed_loop(spec: Spec) -> dict[str, Any]:
    """Unary requests; latencies of those that ended within the window."""
    latencies: list[float] = []
    counting = stopped = False
    request = spec.request()

    async def client() -> None:
        connection = await _connect(spec)
        while not stopped:
            started = time.perf_counter()
            await connection.ask(request)
            if counting:
                latencies.append(time.perf_counter() - started)

    clients = asyncio.gather(*(client() for _ in range(spec.clients)))
    await _meanwhile(clients, spec.warm_up_s)
    _mark("begin", 0)
    counting, cpu = True, _cpu_s()
    await _meanwhile(clients, spec.window_s)
    counting, cpu = False, _cpu_s() - cpu
    _mark("end", len(latencies))
    stopped = True
    await clients
    if len(latencies) < 2:
        raise ConnectionError(f"only {len(latencies)} answers came within {spec.window_s} s")
    cuts = statistics.quantiles(latencies, n=100)
    return {"p50_ms": 1e3 * cuts[49], "p99_ms": 1e3 * cuts[98], "load_busy": cpu / spec.window_s}


async def streams(spec: Spec) -> dict[str, Any]:
    """One stream per client, all at once."""
    connections = [await _connect(spec) for _ in range(spec.clients)]
    request = spec.request()
    if spec.window_s is None:
        _mark("begin", 0)
        sys.stdin.readline()  # until the parent has looked at its processes
    started, cpu = time.perf_counter(), _cpu_s()
    answers = asyncio.gather(*(connection.ask(request) for connection in connections))
    if spec.window_s is not None:
        await _meanwhile(answers, spec.warm_up_s)
        _mark("begin", sum(connection.events for connection in connections))
        await _meanwhile(answers, spec.window_s)
        _mark("end", sum(connection.events for connection in connections))
    await answers
    busy = (_cpu_s() - cpu) / (time.perf_counter() - started)
    if spec.window_s is None:
        _mark("end", spec.clients * spec.body["max_tokens"])  # as the answers have to confirm
    counts = [_tokens(connection) for connection in connections]
    digests = {digest for _, digest in counts}
    return {
        "fewest": min(count for count, _ in counts),  # events with text, of one stream
        "most": max(count for count, _ in counts),
        "digest": digests.pop() if len(digests) == 1 else None,
        "load_busy": busy,
    }


def _tokens(connection: Connection) -> tuple[int, str]:
    """How many events carried text, and the digest of all of it."""
    texts = []
    for line in b"".join(connection.body).split(b"\n"):
        if line.startswith(b"data: {"):
            event = msgspec.json.decode(line.removeprefix(_EVENT))
            if "error" in event:
                raise ConnectionError(f"the stream ended with {event['error']}")
            texts += [text for choice in event["choices"] if (text := choice["delta"].get("content"))]
    return len(texts), hashlib.sha256("".join(texts).encode()).hexdigest()


async def _meanwhile(clients: asyncio.Future[Any], seconds: float) -> None:
    """Let time pass; a client that fails ends it."""
    await asyncio.wait([clients], timeout=seconds)
    if clients.done():
        clients.result()
        raise ConnectionError(f"all answers had come before the {seconds} s were over")


async def _connect(spec: Spec) -> Connection:
    _, connection = await asyncio.get_running_loop().create_connection(Connection, spec.host, spec.port)
    return connection


def _mark(name: str, count: int) -> None:
    print(json.dumps({"mark": name, "at_s": time.perf_counter(), "count": count}), flush=True)


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    spec = Spec(**json.loads(sys.stdin.readline()))
    result = uvloop.run(streams(spec) if spec.streams else closed_loop(spec))
    print(json.dumps({"mark": "result", **result}), flush=True)


if __name__ == "__main__":
    main()
