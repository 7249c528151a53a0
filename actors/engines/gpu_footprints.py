"""What engines were seen to take of a card, kept on disk: measured once per model and configuration.

Used by `gpu_share` alone.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from actors.policies.gpu_memory import Footprint


class Footprints:
    """A folder with one small file per model and configuration.

    Args:
        folder: made if missing.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    def find(self, key: str) -> Footprint | None:
        """What was measured; None when nothing was, or nothing that can be read."""
        try:
            return msgspec.json.decode(self._path(key).read_bytes(), type=Footprint)
        except (OSError, msgspec.DecodeError):
            return None

    def keep(self, key: str, footprint: Footprint) -> None:
        """Remember a measurement."""
        whole = self._path(key).with_suffix(".new")
        whole.write_bytes(msgspec.json.encode(footprint))
        whole.replace(self._path(key))

    def forget(self, key: str) -> None:
        """Measure again at the next start."""
        self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
