"""The gateway as Python code in the cluster sees it: its direct calls over a Serve handle.

Owns the frames of a streamed answer, which `actors.gateway_direct` writes and `AnswerStream` reads: everything
that is at hand travels as one frame. Errors arrive as ours. `app.client` is what users hold.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from ray import serve
from ray.serve.exceptions import RayServeException

from actors.errors import DeadlineExceeded, EngineFailed, Unavailable, from_wire
from actors.handles.call import raise_ours, result
from actors.stores.catalog_records import Attributes, StoreFileRecord, VectorStoreRecord
from actors.telemetry import Stage
from actors.types import (
    Embeddings,
    GenerationCall,
    ModelCard,
    Passage,
    RetrievalQuery,
    RetrievalResult,
    TokenDelta,
)

_GRACE_S = 2.0  # the gateway keeps deadlines itself; after this it is taken for lost


class Opening(msgspec.Struct, frozen=True, array_like=True):
    """What is known when the first delta is at hand."""

    passages: tuple[Passage, ...]  # given to the model as context, best first
    headers: dict[str, str]  # x-ratelimit-*, x-shoal-degraded, as HTTP has them


class AnswerFrame(msgspec.Struct, frozen=True, array_like=True):
    """A piece of a streamed answer: the first has `opening`, the last `stage_s` or `error`."""

    deltas: tuple[TokenDelta, ...] = ()
    opening: Opening | None = None
    stage_s: dict[Stage, float] | None = None  # seconds by stage; they add up to the time in the gateway
    error: dict[str, Any] | None = None  # `ShoalError.to_wire`


encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(AnswerFrame).decode


class AnswerStream:
    """The deltas of one answer; an async iterator. Made by `GatewayClient.stream`.

    Attributes:
        opening: what came with the first delta.
        stage_s: seconds by stage, once the answer is whole.
    """

    def __init__(self, response: Any, timeout_s: float) -> None:
        self.opening = Opening(passages=(), headers={})
        self.stage_s: Mapping[Stage, float] | None = None
        self._response = response
        self._ready: deque[TokenDelta] = deque()
        self._ends_at = asyncio.get_running_loop().time() + timeout_s + _GRACE_S
        self._closed = False

    async def open(self) -> None:
        """Wait for the first delta.

        Raises:
            ShoalError: there will be none.
        """
        await self._read()

    def __aiter__(self) -> AnswerStream:
        return self

    async def __anext__(self) -> TokenDelta:
        while not self._ready:
            if self.stage_s is not None or self._closed:
                raise StopAsyncIteration
            await self._read()
        return self._ready.popleft()

    async def aclose(self) -> None:
        """Cancel the work behind it, down to the engine. Safe to call twice and after the end."""
        if not self._closed:
            self._closed = True
            self._ready.clear()
            if self.stage_s is None:
                self._response.cancel()

    async def _read(self) -> None:
        try:
            frame = await self._frame()
        except BaseException:
            await self.aclose()
            raise
        self._ready += frame.deltas
        self.opening = frame.opening or self.opening
        self.stage_s = frame.stage_s

    async def _frame(self) -> AnswerFrame:
        try:
            async with asyncio.timeout_at(self._ends_at):
                frame = decode(await self._response.__anext__())
        except StopAsyncIteration:
            raise EngineFailed("the gateway ended before the answer was complete; try again") from None
        except TimeoutError:
            raise DeadlineExceeded("no answer from the gateway before the deadline") from None
        except Exception as error:
            raise_ours(error, "gateway")
        if frame.error is not None:
            raise from_wire(frame.error)
        return frame


class GatewayClient:
    """One gateway application, called with one key.

    Args:
        app_name: the Serve application.
        api_key: None in open mode.
        timeout_s: of every call but `stream`, which has its own.
    """

    def __init__(self, app_name: str, api_key: str | None, timeout_s: float) -> None:
        self._app_name = app_name
        self._api_key = api_key
        self._timeout_s = timeout_s
        self._handle: Any = None
        self._methods: dict[str, Any] = {}

    async def stream(self, call: GenerationCall, timeout_s: float) -> AnswerStream:
        """Start an answer; returns when its first delta is at hand.

        Args:
            call: what to answer; its own `timeout_s` is the gateway's to keep.
            timeout_s: until the last delta.

        Raises:
            ShoalError: anything that goes wrong before the first delta.
        """
        method = await self._method("direct_stream", stream=True)
        stream = AnswerStream(method.remote(self._api_key, call), timeout_s)
        await stream.open()
        return stream

    async def embed(self, texts: Sequence[str], model: str | None, dimensions: int | None) -> Embeddings:
        """Vectors of texts; `model` None is the system's own embedding model."""
        found: Embeddings = await self._call("direct_embed", tuple(texts), model, dimensions)
        return found

    async def search(self, query: RetrievalQuery) -> RetrievalResult:
        """Passages; the tenant is the key's, whatever the query says."""
        found: RetrievalResult = await self._call("direct_search", query)
        return found

    async def models(self) -> list[ModelCard]:
        """What can be named as `model`."""
        found: list[ModelCard] = await self._call("direct_models")
        return found

    async def create_store(self, name: str) -> VectorStoreRecord:
        """An empty vector store."""
        made: VectorStoreRecord = await self._call("direct_create_store", name)
        return made

    async def add_document(
        self, store_id: str, filename: str, data: bytes, attributes: Attributes
    ) -> StoreFileRecord:
        """Upload a document and attach it; ingestion goes on without the caller."""
        # By reference: what travels by value is limited to 4 MB.
        method = await self._method("direct_add_document", by_reference=True)
        call = method.remote(self._api_key, store_id, filename, data, attributes)
        made: StoreFileRecord = await result(call, timeout_s=self._timeout_s, what="gateway")
        return made

    async def store_file(self, store_id: str, file_id: str) -> StoreFileRecord:
        """A file of a vector store, with its status and progress."""
        found: StoreFileRecord = await self._call("direct_store_file", store_id, file_id)
        return found

    async def _call(self, name: str, *args: Any) -> Any:
        method = await self._method(name)
        return await result(method.remote(self._api_key, *args), timeout_s=self._timeout_s, what="gateway")

    async def _method(self, name: str, *, stream: bool = False, by_reference: bool = False) -> Any:
        if self._handle is None:
            try:
                self._handle = await asyncio.to_thread(serve.get_app_handle, self._app_name)
            except RayServeException:
                raise Unavailable(
                    f"no Serve application {self._app_name!r} runs in this Ray cluster"
                ) from None
        if name not in self._methods:
            self._methods[name] = self._handle.options(
                method_name=name, stream=stream, _by_reference=by_reference
            )
        return self._methods[name]
