"""Vector stores, their files and batches: OpenAI's wire shapes, checked, to the catalog's records and back.

`app.api.vector_stores` calls it. It knows no HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from actors.policies.chunking import Chunking
from actors.stores.catalog_records import (
    Attachment,
    FileBatchRecord,
    FileCounts,
    StoreFileRecord,
    VectorStoreRecord,
)
from actors.stores.catalog_stores import StoreSettings
from actors.types import Passage, RetrievalQuery
from app.schemas.bad_input import wrong
from app.schemas.chat import RankingOptions
from app.schemas.common import BoundedObject, Unsupported, WireModel

MAX_BATCH_FILES = 2000
MAX_QUERIES = 16
_DEFAULT_RESULTS = 10

FileId = Annotated[str, Field(min_length=1, max_length=128)]
AttributeMap = dict[str, str | bool | int | float]


# --- what is asked -----------------------------------------------------------------------------------


class ExpiresAfter(WireModel):
    """When an unused store goes."""

    anchor: Literal["last_active_at"]
    days: Annotated[int, Field(ge=1, le=365)]


class StaticChunking(WireModel):
    """Sizes in tokens; their bounds are the domain's."""

    max_chunk_size_tokens: int
    chunk_overlap_tokens: int


class ChunkingStrategy(WireModel):
    """OpenAI's `auto`, which means the defaults, or `static`."""

    type: Literal["auto", "static"]
    static: StaticChunking | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.type == "static") != (self.static is not None):
            raise wrong("'static' belongs to type 'static' and to no other", ".static")
        return self

    def to_chunking(self) -> Chunking:
        """The domain's; raises `InvalidRequest` for sizes out of bounds."""
        if self.static is None:
            return Chunking()
        return Chunking(
            max_chunk_size_tokens=self.static.max_chunk_size_tokens,
            chunk_overlap_tokens=self.static.chunk_overlap_tokens,
        )


class CreateVectorStore(WireModel):
    """The body of `POST /v1/vector_stores`."""

    name: str | None = None
    description: str | None = None
    file_ids: Annotated[list[FileId], Field(max_length=MAX_BATCH_FILES)] | None = None
    expires_after: ExpiresAfter | None = None
    chunking_strategy: ChunkingStrategy | None = None
    metadata: dict[str, str] | None = None

    def to_settings(self) -> StoreSettings:
        """The catalog's settings."""
        return StoreSettings(
            name=self.name or "",
            description=self.description,
            metadata=self.metadata or {},
            expires_after_days=self.expires_after.days if self.expires_after else None,
        )

    def to_attachments(self) -> list[Attachment]:
        """The files to begin with."""
        chunking = chunking_of(self.chunking_strategy)
        return [Attachment(file_id=file_id, chunking=chunking) for file_id in self.file_ids or ()]


class UpdateVectorStore(WireModel):
    """The body of `POST /v1/vector_stores/{id}`: what is absent stays, null clears."""

    name: str | None = None
    expires_after: ExpiresAfter | None = None
    metadata: dict[str, str] | None = None

    def to_changes(self) -> Mapping[str, Any]:
        """By the field names of `StoreSettings`."""
        changes = {
            "name": self.name or "",
            "expires_after": self.expires_after.days if self.expires_after else None,
            "metadata": self.metadata or {},
        }
        names = {"expires_after": "expires_after_days"}
        return {names.get(key, key): changes[key] for key in changes if key in self.model_fields_set}


class AttachFile(WireModel):
    """The body of `POST /v1/vector_stores/{id}/files`, and one of `files` of a batch."""

    file_id: FileId
    attributes: AttributeMap | None = None
    chunking_strategy: ChunkingStrategy | None = None

    def to_attachment(self) -> Attachment:
        """The catalog's."""
        return Attachment(
            file_id=self.file_id,
            attributes=self.attributes or {},
            chunking=chunking_of(self.chunking_strategy),
        )


class UpdateFile(WireModel):
    """The body of `POST /v1/vector_stores/{id}/files/{file}`: null clears the attributes."""

    attributes: AttributeMap | None


class CreateFileBatch(WireModel):
    """The body of `POST /v1/vector_stores/{id}/file_batches`: `file_ids` or `files`."""

    file_ids: Annotated[list[FileId], Field(min_length=1, max_length=MAX_BATCH_FILES)] | None = None
    files: Annotated[list[AttachFile], Field(min_length=1, max_length=MAX_BATCH_FILES)] | None = None
    attributes: AttributeMap | None = None
    chunking_strategy: ChunkingStrategy | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.file_ids is None) == (self.files is None):
            raise wrong("give 'file_ids' or 'files', one of both", ".file_ids")
        if self.files is not None and (self.attributes or self.chunking_strategy):
            raise wrong("with 'files', each file has its own attributes and chunking_strategy", ".files")
        return self

    def to_attachments(self) -> list[Attachment]:
        """The catalog's."""
        if self.files is not None:
            return [file.to_attachment() for file in self.files]
        chunking = chunking_of(self.chunking_strategy)
        return [
            Attachment(file_id=file_id, attributes=self.attributes or {}, chunking=chunking)
            for file_id in self.file_ids or ()
        ]


def _queries(value: Any) -> Any:
    """One query or several, as a list."""
    queries = [value] if isinstance(value, str) else value
    if not isinstance(queries, list) or not 1 <= len(queries) <= MAX_QUERIES:
        raise wrong(f"'query' must be a string or a list of 1 to {MAX_QUERIES} strings")
    if not all(isinstance(query, str) and query.strip() for query in queries):
        raise wrong("'query' must not be empty")
    return queries


def _without_rerank(options: Any) -> Any:
    """OpenAI's ranker `none` asks for no rerank; there is none to leave out."""
    asked = isinstance(options, dict) and options.get("ranker") == "none"
    return {**options, "ranker": "auto"} if asked else options


class SearchRequest(WireModel):
    """The body of `POST /v1/vector_stores/{id}/search`."""

    query: Annotated[list[str], BeforeValidator(_queries)]
    filters: BoundedObject | None = None
    max_num_results: Annotated[int, Field(ge=1, le=50)] | None = None
    ranking_options: Annotated[RankingOptions | None, BeforeValidator(_without_rerank)] = None
    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "rewrite_query": Unsupported("queries are searched as they are; only false is allowed", (False,)),
    }

    @property
    def limit(self) -> int:
        """The most results."""
        return self.max_num_results or _DEFAULT_RESULTS

    def to_queries(self, tenant: str, vector_store_id: str) -> list[RetrievalQuery]:
        """The retriever's, one for each query."""
        ranking = self.ranking_options or RankingOptions()
        return [
            RetrievalQuery(
                tenant=tenant,
                vector_store_ids=(vector_store_id,),
                text=text,
                max_num_results=self.limit,
                score_threshold=ranking.score_threshold or 0.0,
                filters=self.filters,
                ranker=ranking.ranker_name(),
            )
            for text in self.query
        ]


def chunking_of(strategy: ChunkingStrategy | None) -> Chunking:
    """The domain's chunking; none is OpenAI's `auto`."""
    return strategy.to_chunking() if strategy else Chunking()


# --- what comes back ---------------------------------------------------------------------------------


def store_object(store: VectorStoreRecord) -> dict[str, Any]:
    """OpenAI's `vector_store`."""
    days = store.expires_after_days
    return {
        "id": store.id,
        "object": "vector_store",
        "created_at": store.created_at,
        "name": store.name,
        "description": store.description,
        "usage_bytes": store.usage_bytes,
        "file_counts": counts_object(store.counts),
        "status": "expired" if store.expired else "in_progress" if store.counts.in_progress else "completed",
        "expires_after": None if days is None else {"anchor": "last_active_at", "days": days},
        "expires_at": store.expires_at,
        "last_active_at": store.last_active_at,
        "metadata": dict(store.metadata),
    }


def store_file_object(file: StoreFileRecord) -> dict[str, Any]:
    """OpenAI's `vector_store.file`; `progress`, 0 to 1, is ours."""
    error = file.last_error
    return {
        "id": file.file_id,
        "object": "vector_store.file",
        "created_at": file.created_at,
        "vector_store_id": file.vector_store_id,
        "usage_bytes": file.usage_bytes,
        "status": file.status,
        "last_error": {"code": error.code, "message": error.message} if error else None,
        "attributes": dict(file.attributes),
        "chunking_strategy": {
            "type": "static",
            "static": {
                "max_chunk_size_tokens": file.chunking.max_chunk_size_tokens,
                "chunk_overlap_tokens": file.chunking.chunk_overlap_tokens,
            },
        },
        "progress": file.progress,
    }


def batch_object(batch: FileBatchRecord) -> dict[str, Any]:
    """OpenAI's `vector_store.files_batch`."""
    return {
        "id": batch.id,
        "object": "vector_store.files_batch",
        "created_at": batch.created_at,
        "vector_store_id": batch.vector_store_id,
        "status": batch.status,
        "file_counts": counts_object(batch.counts),
    }


def counts_object(counts: FileCounts) -> dict[str, int]:
    """OpenAI's `file_counts`."""
    return {
        "in_progress": counts.in_progress,
        "completed": counts.completed,
        "failed": counts.failed,
        "cancelled": counts.cancelled,
        "total": counts.total,
    }


def content_object(text: str) -> dict[str, Any]:
    """OpenAI's page with the parsed text of a file."""
    data = [{"type": "text", "text": text}]
    return {"object": "vector_store.file_content.page", "data": data, "has_more": False, "next_page": None}


def search_object(queries: list[str], passages: list[Passage]) -> dict[str, Any]:
    """OpenAI's page of search results."""
    data = [
        {
            "file_id": passage.file_id,
            "filename": passage.filename,
            "score": passage.score,
            "attributes": dict(passage.attributes),
            "content": [{"type": "text", "text": passage.text}],
        }
        for passage in passages
    ]
    return {
        "object": "vector_store.search_results.page",
        "search_query": queries,
        "data": data,
        "has_more": False,
        "next_page": None,
    }
