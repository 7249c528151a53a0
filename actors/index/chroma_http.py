"""Chroma's HTTP API (v2): requests with time-outs, and errors that are ours.

`actors.index.chroma` is its only user. Why not `chromadb`'s own client: its requests have no time-out, nothing
public closes its connections, a server that is down leaks a client per attempt, and an embedding function
stored on a server is code to it. Beside the same server it is not faster (p50 6.8 ms against 6.4 here).
"""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import msgspec

from actors.errors import Conflict, ShoalError, StorageFull, Unavailable
from actors.telemetry import logger

_DATABASE = "/api/v2/tenants/default_tenant/databases/default_database"
_FULL = ("disk is full", "no space left")  # SQLite's words, and the operating system's
# What Chroma answers to a query that meets the first write of a collection.
_NOT_WRITTEN = "Error creating hnsw segment reader: Nothing found on disk"
_log = logger("index.chroma")


class Missing(Exception):
    """The collection does not exist; never leaves `actors.index`."""


class NotYet(Exception):
    """The collection is being written for the first time: a moment later it can be read. Stays in `actors.index`."""


class ChromaHttp:
    """One server.

    Args:
        url: `http://host:port` or https.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/") + _DATABASE
        self._client: httpx.AsyncClient | None = None  # belongs to one event loop: made in it

    async def request(self, method: str, path: str, body: Any = None, *, timeout_s: float) -> Any:
        """Send one request and return its decoded answer.

        Args:
            method: of HTTP.
            path: below the database.
            body: what JSON can carry.
            timeout_s: for all of it.

        Raises:
            Missing: there is no such collection.
            NotYet: it is being written for the first time.
            StorageFull: the server has no room.
            Conflict: the vectors do not fit the collection.
            Unavailable: anything else that is not an answer.
        """
        content = None if body is None else msgspec.json.encode(body)
        try:
            async with asyncio.timeout(timeout_s):
                response = await self._open().request(method, self._url + path, content=content)
        except TimeoutError:
            raise Unavailable(
                f"the vector index gave no answer within {timeout_s:g} s", retry_after_s=1
            ) from None
        except httpx.HTTPError as error:
            _log.warning("chroma_unreachable", error=type(error).__name__)
            raise Unavailable("the vector index cannot be reached", retry_after_s=1) from None
        if response.is_success:
            return msgspec.json.decode(response.content) if response.content else None
        raise _error(response)

    async def close(self) -> None:
        """Close the connections; the next request opens new ones."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    def _open(self) -> httpx.AsyncClient:
        if self._client is None:
            # Time-outs are per request, above; the pool never queues behind its own limit.
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=16)
            headers = {"content-type": "application/json"}
            self._client = httpx.AsyncClient(timeout=None, limits=limits, headers=headers, trust_env=False)  # noqa: S113  asyncio.timeout covers connecting, writing and reading
        return self._client


def _error(response: httpx.Response) -> Exception:
    text = response.text[:500]
    if response.status_code == httpx.codes.NOT_FOUND:
        return Missing(text)
    if any(mark in text.lower() for mark in _FULL):
        return StorageFull("the vector index has no room left to write", retry_after_s=5)
    if _NOT_WRITTEN in text:
        return NotYet(text)
    if "dimension" in text:
        return Conflict("the vectors have another number of dimensions than those in the vector store")
    _log.error("chroma_error", status=response.status_code, answer=text)
    return _broken()


def _broken() -> ShoalError:
    return Unavailable("the vector index failed", retry_after_s=1)
