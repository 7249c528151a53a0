"""One HTTP/1.1 request and its answer, piece by piece with the time of each: as cheap as it gets.

Used by `open_loop`, which looks into answers only when the load is over. A client library, or asyncio's own streams,
would cost more processor time than a token costs the system under test.
"""

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import httptools


class Exchange(asyncio.Protocol):
    """A connection for one request; also httptools' callbacks."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.pieces: list[tuple[float, bytes]] = []  # of the body, with `time.monotonic`
        self._parser = httptools.HttpResponseParser(self)
        self._complete = asyncio.get_running_loop().create_future()

    @property
    def body(self) -> bytes:
        """What has come of it."""
        return b"".join(piece for _, piece in self.pieces)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(ConnectionError(f"no HTTP: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(ConnectionError(f"the connection ended before the answer did: {exc}"))

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode().lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self.pieces.append((time.monotonic(), body))

    def on_message_complete(self) -> None:
        self._end(None)

    async def wait(self) -> None:
        """Until the answer is complete.

        Raises:
            ConnectionError: it will never be.
        """
        await self._complete

    def _end(self, error: ConnectionError | None) -> None:
        if self._complete.done():
            return
        if error is None:
            self._complete.set_result(None)
        else:
            self._complete.set_exception(error)


async def exchange(
    url: str, body: Mapping[str, Any], headers: Mapping[str, str], timeout_s: float
) -> tuple[Exchange, OSError | None]:
    """Send a request over a connection of its own.

    Returns:
        What came, and why no more did: nothing, a broken connection, or TimeoutError.
    """
    loop = asyncio.get_running_loop()
    place = urlsplit(url)
    made = Exchange()
    transport = None
    try:
        async with asyncio.timeout(timeout_s):
            transport, _ = await loop.create_connection(lambda: made, place.hostname, place.port)
            transport.write(_request(place.netloc, place.path, json.dumps(body).encode(), headers))
            await made.wait()
    except OSError as error:  # TimeoutError is one
        return made, error
    finally:
        if transport is not None:
            transport.abort()
    return made, None


def _request(host: str, path: str, payload: bytes, headers: Mapping[str, str]) -> bytes:
    lines = [
        f"POST {path} HTTP/1.1",
        f"host: {host}",
        "content-type: application/json",
        f"content-length: {len(payload)}",
        "connection: close",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + payload
