"""The secret that keys are hashed under: read from a file, or made once in data_dir.

Called where a `KeyStore` is made (gateway, `shoal keys`). It is a file and never in Redis, so that a dump of
Redis alone cannot be used to try secrets.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from actors.stores.config import StorageConfig

_FEWEST_BYTES = 16


def load_pepper(pepper_file: Path | None, storage: StorageConfig) -> bytes:
    """Read the pepper.

    Args:
        pepper_file: of `AuthConfig`; a mounted secret in production. None: `pepper` in data_dir, made on the
            first call with 32 random bytes and mode 0600.
        storage: where data_dir is. With an outside Redis, gateways may run on other machines: then the file
            must be given.

    Raises:
        ValueError: no file is given where one is needed, or it is unreadable, too short or open to others.
    """
    if pepper_file is not None:
        return _read(pepper_file.expanduser(), "auth.pepper_file")
    if storage.redis_url is not None:
        raise ValueError("auth.pepper_file must be set where redis_url is: all gateways share one pepper")
    path = storage.root / "pepper"
    if not path.exists():
        _make(path)
    if path.stat().st_mode & 0o077:
        raise ValueError(f"{path} must be readable by its owner only: chmod 600 {path}")
    return _read(path, "pepper in data_dir")


def _read(path: Path, what: str) -> bytes:
    try:
        pepper = path.read_bytes().strip()
    except OSError as error:
        raise ValueError(f"{what} ({path}) cannot be read: {error.strerror}") from None
    if len(pepper) < _FEWEST_BYTES:
        raise ValueError(f"{what} ({path}) must hold at least {_FEWEST_BYTES} bytes")
    return pepper


def _make(path: Path) -> None:
    # Written aside and linked into place: of several gateways that start at once one wins, and nobody ever
    # reads half a file.
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = path.with_name(f"pepper.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
            file.flush()
            os.fsync(file.fileno())
        os.link(draft, path)
    except FileExistsError:
        return
    finally:
        draft.unlink()
