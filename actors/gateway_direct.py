"""The gateway's calls for Python code in the cluster: what HTTP routes do, without HTTP.

`Gateway` inherits `DirectCalls`; `actors.handles.gateway` calls the methods over a Serve handle. Every one takes
an API key and authenticates it as HTTP does; what a caller may do is checked here by the same scopes.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

from actors import telemetry
from actors.errors import InvalidRequest, PermissionDenied, ShoalError
from actors.handles.gateway import AnswerFrame, Opening, encode
from actors.handles.model import ModelStream
from actors.stores.catalog import Catalog
from actors.stores.catalog_records import (
    Attachment,
    Attributes,
    FileRecord,
    StoreFileRecord,
    VectorStoreRecord,
)
from actors.stores.catalog_stores import StoreSettings
from actors.stores.documents import DocumentStore
from actors.stores.jobs import JobLog
from actors.stores.keys import AuthenticatedKey
from actors.telemetry import StageClock
from actors.types import (
    Embeddings,
    GenerationCall,
    ModelCard,
    Principal,
    RetrievalQuery,
    RetrievalResult,
)

_PIECE_BYTES = 1 << 20
_CLIENT_LEFT = 499
_FILENAME = re.compile(r"[^/\\\x00-\x1f\x7f-\x9f]{1,255}")


class Gateway(Protocol):
    """What the direct calls need of the gateway."""

    @property
    def config(self) -> Any:
        """`GatewayConfig`."""

    @property
    def catalog(self) -> Catalog:
        """Records of files and vector stores."""

    @property
    def documents(self) -> DocumentStore:
        """Uploaded bytes."""

    @property
    def jobs(self) -> JobLog:
        """Where ingestion is enqueued."""

    async def authenticate(self, authorization: str | None, clock: StageClock) -> AuthenticatedKey:
        """Who is calling."""

    async def generate(
        self, caller: AuthenticatedKey, call: GenerationCall, clock: StageClock
    ) -> ModelStream:
        """Run one generation."""

    async def embed(
        self,
        caller: AuthenticatedKey,
        model: str,
        inputs: Sequence[str],
        clock: StageClock,
        dimensions: int | None = None,
    ) -> Embeddings:
        """Embed texts."""

    async def search(
        self, principal: Principal, query: RetrievalQuery, clock: StageClock | None = None
    ) -> RetrievalResult:
        """Search vector stores."""

    async def models(self) -> list[ModelCard]:
        """What can be asked for."""


class DirectCalls:
    """The methods that a handle to the gateway has. Without state: `self` is the gateway."""

    async def direct_stream(self: Gateway, api_key: str | None, call: GenerationCall) -> AsyncIterator[bytes]:
        """Answer a chat or completion as frames; closing the stream cancels down to the engine.

        An error is the last frame: raised, it would cross Ray as a traceback.
        """
        clock, stream, status = StageClock(), None, _CLIENT_LEFT
        try:
            caller = await self.authenticate(_bearer(api_key), clock)
            stream = await self.generate(caller, call, clock)
            opening: Opening | None = Opening(passages=tuple(stream.passages), headers=dict(stream.headers))
            async for delta in stream:
                yield encode(AnswerFrame(deltas=(delta, *stream.take_ready()), opening=opening))
                opening = None
            yield encode(AnswerFrame(opening=opening, stage_s=clock.stages_s()))
            status = 200
        except ShoalError as error:
            status = error.status_code
            yield encode(AnswerFrame(error=error.to_wire()))
        except Exception:
            status = 500
            raise
        finally:
            # A label only once the model is known to exist: callers could make up new ones.
            _record("generate", status, clock, call.model if stream else "")
            if stream is not None:
                await stream.aclose()

    async def direct_embed(
        self: Gateway, api_key: str | None, texts: Sequence[str], model: str | None, dimensions: int | None
    ) -> Embeddings:
        """Embed texts with `model`, or with the system's own."""
        async with _caller(self, "embed", api_key, "inference") as (caller, clock):
            settings = self.config.retrieval
            name = model or (settings.embedding_model if settings else "")
            return await self.embed(caller, name, texts, clock, dimensions)

    async def direct_search(self: Gateway, api_key: str | None, query: RetrievalQuery) -> RetrievalResult:
        """Search vector stores of the key's tenant."""
        async with _caller(self, "search", api_key, "documents") as (caller, clock):
            return await self.search(caller.principal, query, clock)

    async def direct_models(self: Gateway, api_key: str | None) -> list[ModelCard]:
        """What can be named as `model`."""
        async with _caller(self, "models", api_key, None):
            return await self.models()

    async def direct_create_store(self: Gateway, api_key: str | None, name: str) -> VectorStoreRecord:
        """Make an empty vector store."""
        async with _caller(self, "create_store", api_key, "documents") as (caller, _):
            return await self.catalog.stores.create(caller.principal.tenant, StoreSettings(name=name))

    async def direct_add_document(
        self: Gateway, api_key: str | None, store_id: str, filename: str, data: bytes, attributes: Attributes
    ) -> StoreFileRecord:
        """Upload a document and attach it to a vector store; ingestion goes on by itself.

        Raises:
            NotFound: there is no such vector store.
            InvalidRequest: the document is empty, or its name is none.
            PayloadTooLarge, StorageFull, Unavailable: it was not stored.
        """
        async with _caller(self, "add_document", api_key, "documents") as (caller, _):
            tenant = caller.principal.tenant
            _check_document(filename, data)
            await self.catalog.generation(tenant, store_id)  # before anything is stored
            file_id = self.catalog.files.new_id()
            written = await self.documents.put_source(
                tenant, file_id, _pieces(data), self.config.max_upload_bytes
            )
            file = FileRecord(
                id=file_id,
                filename=filename,
                bytes=written.size_bytes,
                purpose="assistants",
                created_at=0,  # set by the catalog
                sha256=written.sha256,
            )
            file = await self.catalog.files.add(tenant, file)
            attachment = Attachment(file_id=file_id, attributes=attributes)
            records = await self.catalog.store_files.attach(tenant, store_id, [(file, attachment)], self.jobs)
            return records[0]

    async def direct_store_file(
        self: Gateway, api_key: str | None, store_id: str, file_id: str
    ) -> StoreFileRecord:
        """A file of a vector store, with its status and progress."""
        async with _caller(self, "store_file", api_key, "documents") as (caller, _):
            return await self.catalog.store_files.get(caller.principal.tenant, store_id, file_id)


@asynccontextmanager
async def _caller(
    gateway: Gateway, call: str, api_key: str | None, scope: str | None
) -> AsyncIterator[tuple[AuthenticatedKey, StageClock]]:
    """Authenticate, check the scope, and record how the call ended."""
    clock, status = StageClock(), _CLIENT_LEFT
    try:
        caller = await gateway.authenticate(_bearer(api_key), clock)
        _require(caller.principal, scope)
        yield caller, clock
        status = 200
    except Exception as error:
        status = error.status_code if isinstance(error, ShoalError) else 500
        raise
    finally:
        _record(call, status, clock, "")


def _require(principal: Principal, scope: str | None) -> None:
    allowed = principal.scopes
    if scope is not None and scope not in allowed and "admin" not in allowed:
        raise PermissionDenied(f"this key lacks the scope {scope!r}; it has: {', '.join(allowed)}")


def _record(call: str, status: int, clock: StageClock, model: str) -> None:
    route, label = f"python:{call}", str(status)
    telemetry.count("shoal_requests_total", route=route, model=model, status=label)
    telemetry.observe("shoal_request_seconds", clock.elapsed_s(), route=route, model=model, status=label)


def _bearer(api_key: str | None) -> str | None:
    return None if api_key is None else f"Bearer {api_key}"


def _check_document(filename: str, data: bytes) -> None:
    if not data:
        raise InvalidRequest("the document is empty", "data")
    if not _FILENAME.fullmatch(filename):
        raise InvalidRequest(
            "filename must have 1 to 255 characters, without slashes and control characters", "filename"
        )


async def _pieces(data: bytes) -> AsyncIterator[bytes]:
    for at in range(0, len(data), _PIECE_BYTES):
        yield data[at : at + _PIECE_BYTES]
