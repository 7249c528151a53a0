"""HTTP/1.1 as cheap as it gets: one POST per connection, and the body piece by piece as it comes.

A client library would hide what these tests look at (a body that just stops, a reader that is slow) and cost more
processor time than what is tested.
"""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

CHAT = "/v1/chat/completions"


class BrokenAnswer(ConnectionError):
    """The connection ended before the answer did."""


@dataclass(frozen=True)
class Response:
    """The head of an answer, and its body to be read."""

    status: int
    headers: Mapping[str, str]
    reader: asyncio.StreamReader

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes; raises BrokenAnswer when it stops before its end."""
        try:
            if self.headers.get("transfer-encoding") == "chunked":
                while size := int(await self.reader.readuntil(b"\r\n"), 16):
                    yield (await self.reader.readexactly(size + 2))[:-2]
                await self.reader.readuntil(b"\r\n")
            elif (size := self.headers.get("content-length")) is not None:
                yield await self.reader.readexactly(int(size))
            else:
                yield await self.reader.read()
        except asyncio.IncompleteReadError as error:
            raise BrokenAnswer("the body stops before its end") from error

    async def json(self) -> Any:
        return json.loads(b"".join([piece async for piece in self.pieces()]))


@asynccontextmanager
async def post(
    url: str, body: Any, *, headers: Mapping[str, str] | None = None, receive_buffer: int | None = None
) -> AsyncIterator[Response]:
    """Send one request; `receive_buffer` in bytes makes the kernel buffer little for a slow reader."""
    place = urlsplit(url)
    sock = socket.socket()
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.settimeout(0)
    writer = None
    try:
        await asyncio.get_running_loop().sock_connect(sock, (place.hostname, place.port))
        limit = 2**16 if receive_buffer is None else 2048  # what asyncio reads ahead is twice this
        reader, writer = await asyncio.open_connection(sock=sock, limit=limit)
        payload = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = {
            "host": place.netloc,
            "content-type": "application/json",
            "content-length": str(len(payload)),
            "connection": "close",
            **(headers or {}),
        }
        lines = [f"POST {place.path} HTTP/1.1", *(f"{name}: {value}" for name, value in head.items())]
        writer.write("\r\n".join([*lines, "", ""]).encode() + payload)
        yield await _head(reader)
    finally:
        if writer is not None:
            writer.transport.abort()  # a polite end would wait for a slow peer
        sock.close()


async def _head(reader: asyncio.StreamReader) -> Response:
    try:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    except asyncio.IncompleteReadError as error:
        raise BrokenAnswer("closed before an answer") from error
    headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
    return Response(int(lines[0].split()[1]), headers, reader)
