"""Ingestion: makes document store and index agree with what the catalog says about one file or store.

Owns the order of the steps that makes a crash anywhere harmless: parse, cut, embed, write the immutable version,
write the index, verify, publish, and only then remove what is no longer wanted. `actors.job_runner` runs it for
each job. It reads what is wanted when it runs, so running it twice, late or in vain changes nothing. It knows
neither Ray nor HTTP, and leaves when to try again to `actors.policies.ingestion`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np

from actors.errors import NotFound, Unavailable
from actors.index.protocol import IndexEntry, Matrix, VectorIndex
from actors.policies.chunking import Tokenize, cut, document_version, rough_tokens
from actors.policies.ingestion import KIND, IngestionTask
from actors.stores.catalog import Catalog
from actors.stores.catalog_records import FileRecord, LastError, StoreFileRecord
from actors.stores.documents import DocumentStore, DocumentVersion
from actors.stores.job_records import Lease
from actors.stores.parsing import BadDocument
from actors.types import Chunk, Embeddings

Embed = Callable[[Sequence[str]], Awaitable[Embeddings]]
Parse = Callable[[AsyncIterator[bytes], str], Awaitable[str]]
Outcome = Literal["published", "unchanged", "failed", "removed", "superseded"]

_INDEX_BATCH = 1000  # entries per upsert; Chroma takes at most 5,461
_VERIFIED = 5  # entries per document that must find themselves
_RECHECKS = 5  # times that the wanted state may change under one run


class Superseded(Exception):
    """What is being made is not wanted any more: the file was removed, cancelled or attached anew."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Embedding:
    """How chunks become vectors."""

    embed: Embed
    model: str  # its name is part of every document version
    tokenize: Tokenize = rough_tokens  # of the model
    batch_size: int = 32  # chunks per call of `embed`, and between two reports of progress


class Ingestion:
    """Runs ingestion tasks; holds no state between them.

    Args:
        documents: the truth, written before any index.
        catalog: what is wanted and what is published.
        index: the projection that searches read.
        parse: bytes to text; raises `BadDocument` for what cannot be.
        embedding: text to vectors.
    """

    kind = KIND
    subject = "processing this file"

    def __init__(
        self,
        documents: DocumentStore,
        catalog: Catalog,
        index: VectorIndex,
        parse: Parse,
        embedding: Embedding,
    ) -> None:
        self._documents = documents
        self._catalog = catalog
        self._index = index
        self._parse = parse
        self._embedding = embedding

    def task(self, lease: Lease) -> IngestionTask:
        """What a job asks for."""
        return msgspec.convert(lease.payload, IngestionTask)

    async def run(self, tenant: str, task: IngestionTask) -> Outcome:
        """Do what a task asks for.

        Raises:
            ShoalError: a part failed; `retryable` says whether another try may help.
            Exception: something nobody foresaw.
        """
        if task.action == "drop_store":
            return await self._drop_store(tenant, task.vector_store_id)
        if task.action == "drop_file":
            await self._documents.delete_source(tenant, task.file_id)
            return "removed"
        for _ in range(_RECHECKS):
            try:
                return await self._sync_file(tenant, task)
            except Superseded:
                continue
        return "superseded"  # whatever superseded it brought a job of its own

    async def give_up(self, tenant: str, task: IngestionTask, message: str) -> None:
        """Mark the task's file as failed for good, if it still is in progress."""
        if task.action == "sync_file":
            for record in await self._found(tenant, task):
                await self._catalog.store_files.fail(
                    record, tenant, LastError(code="server_error", message=message)
                )

    # --- one file ------------------------------------------------------------------------------------

    async def _sync_file(self, tenant: str, task: IngestionTask) -> Outcome:
        store_id = task.vector_store_id
        if not await self._catalog.stores.exists(tenant, store_id):
            return await self._drop_store(tenant, store_id)
        found = await self._found(tenant, task)
        if not found:
            return await self._remove_file(tenant, store_id, task.file_id)
        record = found[0]
        outcome: Outcome = "unchanged"
        if record.status == "in_progress":
            record, outcome = await self._ingest(tenant, record)
        elif task.refresh and record.version:
            await self._write_index(await self._published(tenant, record), record)
        await self._remove_other_versions(tenant, record)
        return outcome

    async def _ingest(self, tenant: str, record: StoreFileRecord) -> tuple[StoreFileRecord, Outcome]:
        try:
            version = await self._version(tenant, record)
            await self._write_index(version, record)
            await self._verify(version)
        except BadDocument as error:
            last_error = LastError(code=error.code, message=error.message)
            if not await self._catalog.store_files.fail(record, tenant, last_error):
                raise Superseded from None
            return record, "failed"
        published = await self._catalog.store_files.publish(
            record, tenant, version.version, version.usage_bytes
        )
        if not published:
            raise Superseded
        return await self._catalog.store_files.get(
            tenant, record.vector_store_id, record.file_id
        ), "published"

    async def _version(self, tenant: str, record: StoreFileRecord) -> DocumentVersion:
        """The document version that is wanted: the one stored already, or a new one."""
        try:
            file = await self._catalog.files.get(tenant, record.file_id)
        except NotFound:
            raise BadDocument("invalid_file", "the file was deleted") from None
        name = document_version(file.sha256, record.chunking, self._embedding.model)
        try:
            return await self._documents.get_version(tenant, record.vector_store_id, record.file_id, name)
        except NotFound:
            version = await self._make_version(tenant, record, file, name)
        await self._documents.put_version(tenant, version)
        return version

    async def _make_version(
        self, tenant: str, record: StoreFileRecord, file: FileRecord, name: str
    ) -> DocumentVersion:
        try:
            text = await self._parse(self._documents.read_source(tenant, file.id), file.filename)
        except NotFound:
            raise BadDocument("invalid_file", "the content of the file is gone; upload it again") from None
        spans = await asyncio.to_thread(cut, text, record.chunking, self._embedding.tokenize)
        if not spans:
            raise BadDocument("invalid_file", "the file holds no text that can be searched")
        embeddings = await self._embed(tenant, record, [text[start:end] for start, end in spans])
        return DocumentVersion(
            vector_store_id=record.vector_store_id,
            file_id=file.id,
            filename=file.filename,
            version=name,
            text=text,
            spans=tuple(spans),
            embeddings=embeddings.vectors,
            rows=embeddings.rows,
            dimensions=embeddings.dimensions,
            embedding_model=self._embedding.model,
        )

    async def _embed(self, tenant: str, record: StoreFileRecord, texts: Sequence[str]) -> Embeddings:
        vectors, tokens, dimensions = bytearray(), 0, 0
        rows: list[int] = []
        for at in range(0, len(texts), self._embedding.batch_size):
            if not await self._catalog.store_files.progress(record, tenant, at / len(texts)):
                raise Superseded
            batch = texts[at : at + self._embedding.batch_size]
            some = await self._embedding.embed(batch)
            vectors += some.vectors
            rows += some.rows or [1] * len(batch)
            tokens += some.tokens
            dimensions = some.dimensions
        if len(rows) != len(texts) or len(vectors) != sum(rows) * dimensions * 4:
            raise Unavailable("the embedder gave another number of vectors than it was asked for")
        return Embeddings(vectors=bytes(vectors), dimensions=dimensions, tokens=tokens, rows=tuple(rows))

    # --- the index -----------------------------------------------------------------------------------

    async def _write_index(self, version: DocumentVersion, record: StoreFileRecord) -> None:
        ids, matrix = version.entry_ids, matrix_of(version)
        for at in range(0, len(ids), _INDEX_BATCH):
            some = slice(at, at + _INDEX_BATCH)
            entries = [_entry(one, chunk, version, record) for one, chunk in ids[some]]
            await self._index.upsert(version.vector_store_id, entries, matrix[some])

    async def _verify(self, version: DocumentVersion) -> None:
        ids, matrix = version.entry_ids, matrix_of(version)
        picked = sorted(random.sample(range(len(ids)), min(len(ids), _VERIFIED)))
        wanted = [ids[at][0] for at in picked]
        missing = await self._index.missing(version.vector_store_id, wanted, matrix[picked])
        if missing:
            raise Unavailable(f"the index does not find {len(missing)} of {len(wanted)} entries just written")

    async def _remove_other_versions(self, tenant: str, record: StoreFileRecord) -> None:
        """Remove every version but the published one, from the index before from the truth."""
        store_id, file_id = record.vector_store_id, record.file_id
        for name in await self._documents.list_versions(tenant, store_id, file_id):
            if name == record.version:
                continue
            other = await self._documents.get_version(tenant, store_id, file_id, name)
            await self._index.delete_entries(store_id, [one for one, _ in other.entry_ids])
            await self._documents.delete_versions(tenant, store_id, file_id, name)

    async def _remove_file(self, tenant: str, store_id: str, file_id: str) -> Outcome:
        await self._index.delete_files(store_id, [file_id])
        await self._documents.delete_versions(tenant, store_id, file_id)
        return "removed"

    async def _drop_store(self, tenant: str, store_id: str) -> Outcome:
        await self._index.drop(store_id)
        await self._documents.delete_versions(tenant, store_id)
        await self._catalog.stores.forget(tenant, store_id)
        return "removed"

    # --- reading -------------------------------------------------------------------------------------

    async def _found(self, tenant: str, task: IngestionTask) -> list[StoreFileRecord]:
        return await self._catalog.store_files.get_all(tenant, task.vector_store_id, [task.file_id])

    async def _published(self, tenant: str, record: StoreFileRecord) -> DocumentVersion:
        return await self._documents.get_version(
            tenant, record.vector_store_id, record.file_id, record.version
        )


def matrix_of(version: DocumentVersion) -> Matrix:
    """The embeddings of a document version, one row per index entry."""
    rows: Matrix = np.frombuffer(version.embeddings, dtype="<f4").reshape(-1, version.dimensions)
    return rows


def _entry(entry_id: str, chunk: Chunk, version: DocumentVersion, record: StoreFileRecord) -> IndexEntry:
    return IndexEntry(
        chunk_id=entry_id,
        file_id=version.file_id,
        filename=version.filename,
        text=chunk.text,
        start=chunk.start,
        attributes=record.attributes,
    )
