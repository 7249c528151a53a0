"""The documents: immutable objects in an object store, the truth that every index is rebuilt from.

Owns two kinds of objects under an fsspec URL, each written once and whole: the uploaded bytes
(`<tenant>/files/<file>/source`) and one document version per ingestion
(`<tenant>/versions/<vector store>/<file>/<version>.msgpack`). The API and `actors.ingestion` write, the
retriever reads. Which version counts is the catalog's to say.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import re
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import fsspec
import msgspec
from fsspec.spec import AbstractBufferedFile

from actors.errors import InvalidRequest, NotFound, PayloadTooLarge, ShoalError, StorageFull, Unavailable
from actors.policies.chunking import make_chunks, window_id
from actors.stores.atomic_file import AtomicFile
from actors.telemetry import logger
from actors.types import Chunk

_BLOCK_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

_log = logger("stores.documents")
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentVersion:
    """One document as it was ingested into one vector store."""

    vector_store_id: str
    file_id: str
    filename: str
    version: str  # hash of content, chunking and embedding model
    text: str  # the parsed document
    spans: tuple[tuple[int, int], ...]  # of its chunks, in characters of `text`
    embeddings: bytes  # little-endian float32 rows of length 1, chunk by chunk
    rows: tuple[int, ...]  # how many of them each chunk has: one per window that the model reads
    dimensions: int
    embedding_model: str

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """The chunks in order; their texts are cut out of `text`."""
        return make_chunks(
            self.text,
            self.spans,
            vector_store_id=self.vector_store_id,
            file_id=self.file_id,
            version=self.version,
        )

    @property
    def entry_ids(self) -> tuple[tuple[str, Chunk], ...]:
        """The index entries, one per row of `embeddings`: their ids, each with its chunk."""
        pairs = zip(self.chunks, self.rows, strict=True)
        return tuple((window_id(chunk.chunk_id, n), chunk) for chunk, count in pairs for n in range(count))

    @property
    def usage_bytes(self) -> int:
        """What it takes in an index: the chunks' text and vectors."""
        return sum(len(self.text[start:end].encode()) for start, end in self.spans) + len(self.embeddings)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """What was written: size and hash of the uploaded bytes."""

    size_bytes: int
    sha256: str


class DocumentStore:
    """Objects of all tenants behind one fsspec URL; blocking calls run in threads.

    Args:
        url: `file:///path`, `s3://bucket/prefix`, `gs://…`, `memory://…`: what fsspec and its plugins know.
            On `file://` every write is synced to disk and appears whole; object stores do that themselves.
    """

    def __init__(self, url: str) -> None:
        self._fs, self._root = fsspec.core.url_to_fs(url)
        self._local = "file" in _protocols(self._fs)

    async def put_source(
        self, tenant: str, file_id: str, pieces: AsyncIterator[bytes], max_bytes: int | None = None
    ) -> Stored:
        """Write uploaded bytes as they come; nothing stays behind when that fails.

        Raises:
            PayloadTooLarge: more than `max_bytes` came.
            StorageFull: no room.
            Unavailable: the store cannot be reached.
        """
        digest, size = hashlib.sha256(), 0
        file = await _in_thread(self._create, self._source(tenant, file_id))
        try:
            async for piece in pieces:
                size += len(piece)
                _check_size(size, max_bytes)
                digest.update(piece)
                await _in_thread(file.write, piece)
            await _in_thread(file.commit)
        except BaseException:
            with suppress(OSError):
                file.discard()
            raise
        return Stored(size_bytes=size, sha256=digest.hexdigest())

    async def read_source(self, tenant: str, file_id: str) -> AsyncIterator[bytes]:
        """The uploaded bytes, in pieces of 1 MiB.

        Raises:
            NotFound: there are none.
            Unavailable: as above.
        """
        file = await _in_thread(self._fs.open, self._source(tenant, file_id), "rb")
        try:
            while piece := await _in_thread(file.read, _BLOCK_BYTES):
                yield piece
        finally:
            file.close()

    async def delete_source(self, tenant: str, file_id: str) -> None:
        """Remove the uploaded bytes; none is fine."""
        await _in_thread(self._remove, self._path(tenant, "files", file_id))

    async def put_version(self, tenant: str, version: DocumentVersion) -> None:
        """Write one document version.

        Raises:
            StorageFull, Unavailable: as above.
        """
        path = self._version(tenant, version.vector_store_id, version.file_id, version.version)
        await _in_thread(self._write, path, msgspec.msgpack.encode(version))

    async def get_version(
        self, tenant: str, vector_store_id: str, file_id: str, version: str
    ) -> DocumentVersion:
        """Read one document version.

        Raises:
            NotFound: it does not exist.
            Unavailable: as above.
        """
        path = self._version(tenant, vector_store_id, file_id, version)
        return await _in_thread(self._read, path)

    async def list_versions(self, tenant: str, vector_store_id: str, file_id: str) -> list[str]:
        """The versions of one document that exist, published or not."""
        folder = self._path(tenant, "versions", vector_store_id, file_id)
        return await _in_thread(self._names, folder)

    async def delete_versions(
        self, tenant: str, vector_store_id: str, file_id: str | None = None, version: str | None = None
    ) -> None:
        """Remove one version, all of a file, or all of a vector store; none is fine."""
        parts = [part for part in (file_id, version and f"{version}.msgpack") if part]
        await _in_thread(self._remove, self._path(tenant, "versions", vector_store_id, *parts))

    # --- blocking, in threads ------------------------------------------------------------------------

    def _create(self, path: str) -> AtomicFile | _RemoteFile:
        return AtomicFile(path, self._path(".staging")) if self._local else _RemoteFile(self._fs, path)

    def _write(self, path: str, data: bytes) -> None:
        file = self._create(path)
        try:
            file.write(data)
            file.commit()
        except BaseException:
            with suppress(OSError):
                file.discard()
            raise

    def _read(self, path: str) -> DocumentVersion:
        return msgspec.msgpack.decode(self._fs.cat_file(path), type=DocumentVersion)

    def _names(self, folder: str) -> list[str]:
        try:
            paths = self._fs.ls(folder, detail=False, refresh=True)
        except FileNotFoundError:
            return []
        names = (str(path).rsplit("/", 1)[-1] for path in paths)
        return sorted(name.removesuffix(".msgpack") for name in names if name.endswith(".msgpack"))

    def _remove(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self._fs.rm(path, recursive=True)

    # --- paths ---------------------------------------------------------------------------------------

    def _source(self, tenant: str, file_id: str) -> str:
        return self._path(tenant, "files", file_id, "source")

    def _version(self, tenant: str, vector_store_id: str, file_id: str, version: str) -> str:
        return self._path(tenant, "versions", vector_store_id, file_id, f"{version}.msgpack")

    def _path(self, *parts: str) -> str:
        # ".staging" is ours; everything else may come from a caller and must not leave its folder.
        for part in parts:
            if part != ".staging" and not _NAME.fullmatch(part):
                raise InvalidRequest(f"{part[:80]!r} is not an id")
        return "/".join((self._root.rstrip("/"), *parts))


class _RemoteFile:
    """A file on an object store: appears when it is committed, as a whole."""

    def __init__(self, fs: Any, path: str) -> None:
        self._fs, self._path = fs, path
        self._file = fs.open(path, "wb")
        self.write = self._file.write

    def commit(self) -> None:
        self._file.close()

    def discard(self) -> None:
        if isinstance(self._file, AbstractBufferedFile):
            self._file.discard()
            self._file.closed = True  # closing, also by the garbage collector, would commit what was written
        else:
            self._fs.rm_file(self._path)  # a file system in memory shows it from the start


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _check_size(size_bytes: int, max_bytes: int | None) -> None:
    if max_bytes is not None and size_bytes > max_bytes:
        raise PayloadTooLarge(f"the file is larger than the {max_bytes:,} bytes allowed", "file")


async def _in_thread(call: Callable[..., _T], *args: Any) -> _T:
    """Run a blocking call of the store in a thread; its errors become ours."""
    try:
        return await asyncio.to_thread(call, *args)
    except ShoalError:
        raise
    except FileNotFoundError:
        raise NotFound("the object does not exist in the document store") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _FULL:
            raise StorageFull("the document store has no room left to write", retry_after_s=5.0) from None
        _log.warning("documents_unavailable", error=type(error).__name__)
        raise Unavailable("the document store cannot be reached", retry_after_s=1.0) from None
