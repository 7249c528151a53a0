"""A local file that appears whole and synced, or not at all.

Used by `actors.stores.documents` for `file://`; object stores give the same promise by themselves. fsspec's
own local transactions stage in the system's temporary folder and copy across file systems: not atomic.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path


class AtomicFile:
    """Written aside, then moved into place.

    Args:
        path: where the file appears on `commit`; missing folders are made.
        staging: folder on the same file system for what is not finished.
    """

    def __init__(self, path: str, staging: str) -> None:
        self._path = Path(path)
        Path(staging).mkdir(parents=True, exist_ok=True)
        self._staged = Path(staging) / uuid.uuid4().hex
        self._file = self._staged.open("xb")
        self.write = self._file.write

    def commit(self) -> None:
        """Sync the bytes, move the file into place and sync the move."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        made = _make_folders(self._path.parent)
        self._staged.replace(self._path)
        for folder in (self._path.parent, *made):
            _sync_folder(folder)

    def discard(self) -> None:
        """Forget what was written; without effect after `commit`."""
        try:
            self._file.close()  # flushes, which a full disk refuses
        finally:
            self._staged.unlink(missing_ok=True)


def _make_folders(folder: Path) -> list[Path]:
    """Make a folder and return the parents whose entries are new."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return [path.parent for path in missing]


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
