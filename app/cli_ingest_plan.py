"""Which local files `shoal ingest` takes, and what has to be done about each: nothing, watch, again, or upload.

Owns the rule that makes a second run harmless. Files are known by the SHA-256 of their bytes, which the API tells
of every upload: bytes that are in the vector store, whoever put them there, are never sent again. What is sent
carries two attributes: `path`, relative to the folder that was named, for filters; and `source`, a hash of its
absolute path. Where the bytes of a source changed, its old file is removed once the new one is searchable. Files
that vanished here stay in the store, and so do the old ones of a folder that moved. `app.cli_ingest` carries the
plan out.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from actors.stores.parse_formats import EXTENSIONS

PATH_CHARS = 512  # the longest value of an attribute


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalFile:
    """A file to ingest."""

    path: Path
    name: str  # the attribute `path`: relative to the folder that was named, with slashes
    sha256: str = ""  # set by `hashed`

    @property
    def source(self) -> str:
        """The attribute `source`: where it lies on this machine, without telling."""
        return hashlib.sha256(os.fsencode(self.path.absolute())).hexdigest()[:32]

    @property
    def attributes(self) -> dict[str, str]:
        """What its file in the vector store carries."""
        return {"path": self.name, "source": self.source}


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFile:
    """A file of the vector store."""

    file_id: str
    source: str  # empty for one that no run made
    sha256: str  # empty for one whose upload is gone
    status: str


@dataclass(kw_only=True, slots=True)
class Found:
    """What lies in the named folders."""

    files: list[LocalFile] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)  # (name, why)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What has to be done."""

    unchanged: Sequence[LocalFile]  # searchable already, or the same bytes as another local file
    watch: Sequence[tuple[LocalFile, str]]  # being ingested by an earlier run: (file, file id)
    again: Sequence[tuple[LocalFile, str]]  # uploaded before, and failed or cancelled
    upload: Sequence[LocalFile]
    replaced: Mapping[str, Sequence[str]]  # hash → ids of the files that go once these bytes are searchable


def find(roots: Iterable[Path], patterns: Sequence[str]) -> Found:
    """The files below `roots`, in order; hidden ones and links to folders are left alone.

    Args:
        roots: files and folders.
        patterns: globs on the name, or on the relative path where the glob has a slash; none takes everything.
    """
    found = Found()
    for root in roots:
        for path, name in _walk(root):
            if patterns and not any(_matches(name, pattern) for pattern in patterns):
                continue
            extension = path.suffix.lower()
            if extension and extension not in EXTENSIONS:
                found.skipped.append((name, f"files of type {extension} are not supported"))
            elif len(name) > PATH_CHARS:
                found.skipped.append((name, f"its path is longer than {PATH_CHARS} characters"))
            else:
                found.files.append(LocalFile(path=path, name=name))
    return found


def _walk(root: Path) -> Iterator[tuple[Path, str]]:
    if not root.is_dir():
        yield root, root.name
        return
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                yield path, path.relative_to(root).as_posix()


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name if "/" in pattern else name.rpartition("/")[2], pattern)


def hashed(file: LocalFile) -> LocalFile:
    """The file with the hash of its bytes; blocks.

    Raises:
        OSError: it cannot be read.
    """
    with file.path.open("rb") as source:
        digest = hashlib.file_digest(source, "sha256").hexdigest()
    return LocalFile(path=file.path, name=file.name, sha256=digest)


def stored(wire: Mapping[str, Any], sha256_of: Mapping[str, str]) -> StoredFile:
    """A vector store file of the API.

    Args:
        wire: as the store lists it.
        sha256_of: hashes of uploaded files by their id.
    """
    return StoredFile(
        file_id=wire["id"],
        source=str((wire.get("attributes") or {}).get("source", "")),
        sha256=sha256_of.get(wire["id"], ""),
        status=wire["status"],
    )


def plan(local: Sequence[LocalFile], there: Sequence[StoredFile]) -> Plan:
    """Compare the local files with those in the store."""
    best = {file.sha256: file for file in sorted(there, key=_use) if file.sha256}
    wanted: dict[str, LocalFile] = {}  # by hash: the first local file with these bytes stands for all
    for file in local:
        wanted.setdefault(file.sha256, file)
    old_ids: dict[str, list[str]] = {}
    for old in there:
        # Bytes that another local file still has are wanted, wherever they came from.
        if old.source and old.sha256 not in wanted:
            old_ids.setdefault(old.source, []).append(old.file_id)
    replaced: dict[str, list[str]] = {}
    for file in local:
        replaced.setdefault(file.sha256, []).extend(old_ids.get(file.source, ()))

    def at(*statuses: str) -> list[tuple[LocalFile, str]]:
        return [
            (file, best[sha].file_id)
            for sha, file in wanted.items()
            if sha in best and best[sha].status in statuses
        ]

    copies = [file for file in local if wanted[file.sha256] is not file]
    return Plan(
        unchanged=[*(file for file, _ in at("completed")), *copies],
        watch=at("in_progress"),
        again=at("failed", "cancelled"),
        upload=[file for sha, file in wanted.items() if sha not in best],
        replaced={sha: ids for sha, ids in replaced.items() if ids},
    )


def _use(file: StoredFile) -> int:
    return ("cancelled", "failed", "in_progress", "completed").index(file.status)
