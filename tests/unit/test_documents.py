"""The document store: whole or not at all, bounded memory, nothing outside its folder, clear errors."""

from __future__ import annotations

import errno
import hashlib
import os
import tracemalloc
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from actors.errors import InvalidRequest, NotFound, PayloadTooLarge, StorageFull, Unavailable
from actors.stores.atomic_file import AtomicFile
from actors.stores.documents import DocumentStore, DocumentVersion

T = "acme"


@pytest.fixture(params=["file", "memory"])
def documents(request, tmp_path):
    url = f"file://{tmp_path}/docs" if request.param == "file" else f"memory://{uuid.uuid4().hex}"
    return DocumentStore(url)


@pytest.fixture
def local(tmp_path):
    return DocumentStore(f"file://{tmp_path}/docs")


async def pieces(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def read(documents, file_id="file-1", tenant=T):
    return b"".join([piece async for piece in documents.read_source(tenant, file_id)])


def version(name="v1", file_id="file-1"):
    text = "Hello world. Ünïcode 😀 here."
    return DocumentVersion(
        vector_store_id="vs_1",
        file_id=file_id,
        filename="a.txt",
        version=name,
        text=text,
        spans=((0, 12), (13, len(text))),
        embeddings=np.eye(2, 4, dtype="<f4").tobytes(),
        rows=(1, 1),
        dimensions=4,
        embedding_model="m",
    )


async def test_uploaded_bytes_come_back_with_their_size_and_hash(documents):
    stored = await documents.put_source(T, "file-1", pieces(b"ab", b"", b"c" * 3_000_000))
    body = b"ab" + b"c" * 3_000_000
    assert (stored.size_bytes, stored.sha256) == (len(body), hashlib.sha256(body).hexdigest())
    assert await read(documents) == body


async def test_a_version_comes_back_with_chunks_cut_out_of_its_text(documents):
    await documents.put_version(T, version())
    found = await documents.get_version(T, "vs_1", "file-1", "v1")
    assert found == version()
    assert [chunk.text for chunk in found.chunks] == ["Hello world.", "Ünïcode 😀 here."]
    assert [found.text[chunk.start : chunk.end] for chunk in found.chunks] == [c.text for c in found.chunks]
    assert found.usage_bytes == len("Hello world.Ünïcode 😀 here.".encode()) + 32


async def test_versions_are_listed_and_deleted_one_by_one_by_file_and_by_store(documents):
    for name, file_id in (("v1", "file-1"), ("v2", "file-1"), ("v1", "file-2")):
        await documents.put_version(T, version(name, file_id))
    assert await documents.list_versions(T, "vs_1", "file-1") == ["v1", "v2"]
    await documents.delete_versions(T, "vs_1", "file-1", "v1")
    assert await documents.list_versions(T, "vs_1", "file-1") == ["v2"]
    await documents.delete_versions(T, "vs_1", "file-1")
    assert await documents.list_versions(T, "vs_1", "file-1") == []
    assert await documents.list_versions(T, "vs_1", "file-2") == ["v1"]
    await documents.delete_versions(T, "vs_1")
    await documents.delete_versions(T, "vs_1")
    assert await documents.list_versions(T, "vs_1", "file-2") == []


async def test_what_does_not_exist_is_not_found_and_may_be_deleted(documents):
    with pytest.raises(NotFound):
        await read(documents, "file-none")
    with pytest.raises(NotFound):
        await documents.get_version(T, "vs_1", "file-1", "none")
    await documents.delete_source(T, "file-none")


async def test_another_tenant_sees_nothing(documents):
    await documents.put_source(T, "file-1", pieces(b"secret"))
    with pytest.raises(NotFound):
        await read(documents, tenant="eve")


@pytest.mark.parametrize("name", ["..", "a/b", "", ".hidden", "a\x00b", "x" * 129])
async def test_a_name_that_could_leave_its_folder_is_refused(documents, name):
    with pytest.raises(InvalidRequest):
        await documents.put_source(T, name, pieces(b"x"))
    with pytest.raises(InvalidRequest):
        await documents.get_version(name, "vs_1", "file-1", "v1")


async def test_an_upload_over_the_limit_leaves_nothing(documents, tmp_path):
    with pytest.raises(PayloadTooLarge, match="10"):
        await documents.put_source(T, "file-1", pieces(b"12345678", b"9012"), max_bytes=10)
    with pytest.raises(NotFound):
        await read(documents)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


async def test_an_upload_that_breaks_off_leaves_nothing(local, tmp_path):
    async def broken() -> AsyncIterator[bytes]:
        yield b"some"
        raise RuntimeError("the client left")

    with pytest.raises(RuntimeError, match="the client left"):
        await local.put_source(T, "file-1", broken())
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


async def test_a_full_disk_is_storage_full_and_leaves_nothing(local, tmp_path, monkeypatch):
    def full(_fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageFull):
        await local.put_source(T, "file-1", pieces(b"x"))
    with pytest.raises(StorageFull):
        await local.put_version(T, version())
    monkeypatch.undo()
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
    await local.put_source(T, "file-1", pieces(b"x"))


async def test_a_store_that_cannot_be_reached_is_unavailable(local, tmp_path):
    (tmp_path / "docs").write_text("a file where the folder should be")
    with pytest.raises(Unavailable):
        await local.put_source(T, "file-1", pieces(b"x"))


async def test_a_large_upload_is_never_in_memory_as_a_whole(local):
    async def large() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield bytes(1 << 20)

    tracemalloc.start()
    try:
        await local.put_source(T, "file-1", large())
        async for _ in local.read_source(T, "file-1"):
            pass
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_file_is_synced_before_it_appears_and_its_folders_after(tmp_path, monkeypatch):
    target, order = tmp_path / "new" / "deep" / "f", []
    monkeypatch.setattr(
        os, "fsync", lambda fd: order.append((str(Path(f"/proc/self/fd/{fd}").readlink()), target.exists()))
    )
    file = AtomicFile(str(target), str(tmp_path / "staging"))
    file.write(b"x")
    assert not target.exists()
    file.commit()
    file.discard()
    assert target.read_bytes() == b"x"
    assert not order[0][1]
    assert Path(order[0][0]).parent.name == "staging"
    synced = {path for path, there in order[1:] if there}
    assert synced == {str(tmp_path / "new" / "deep"), str(tmp_path / "new"), str(tmp_path)}
