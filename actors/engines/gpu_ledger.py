"""The ledger of a node's cards: who may use how many bytes, in one locked file.

A file and not an actor: it has no process that could die, and a lease ends with the process that took it. Every
replica on the node opens the same folder (in Kubernetes a volume of the pod). Beside the ledger lies a lock per card,
the start lease: engines start one at a time.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO

import msgspec
import psutil

from actors.errors import EngineFailed
from actors.policies.gpu_memory import Card, Lease, require_room, sleepers

_POLL_S = 0.02


class _Entry(msgspec.Struct):
    """A lease and the process that holds it."""

    lease: Lease
    pid: int
    started: float  # of the process: pids are used again


class GpuLedger:
    """Leases on the cards of this node.

    Args:
        folder: the node's, the same for all its replicas; made if missing.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._me = (os.getpid(), psutil.Process().create_time())

    def take(self, lease: Lease, card: Card) -> None:
        """Take a lease, or change one's own.

        Raises:
            EngineFailed: the card has no room for it.
        """

        def change(entries: list[_Entry]) -> list[_Entry]:
            require_room(card, [e.lease for e in entries], lease.held_bytes, lease.owner)
            others = [e for e in entries if e.lease.owner != lease.owner]
            return [*others, _Entry(lease, *self._me)]

        self._change(change)

    def release(self, owner: str) -> None:
        """Give a lease back; one that is not there is no error."""
        self._change(lambda entries: [e for e in entries if e.lease.owner != owner])

    def leases(self) -> list[Lease]:
        """All leases of living processes."""
        return [e.lease for e in self._change(lambda entries: entries)]

    def mine(self, owner: str) -> Lease | None:
        """One's own lease."""
        return next((lease for lease in self.leases() if lease.owner == owner), None)

    def ask_to_sleep(self, card: Card, wanted_bytes: int, owner: str) -> bool:
        """Mark the idle neighbours whose sleep would make room for `owner`.

        Returns:
            False when not even all of them would: everybody else works.
        """
        chosen: set[str] = set()

        def change(entries: list[_Entry]) -> list[_Entry]:
            chosen.update(x.owner for x in sleepers(card, [e.lease for e in entries], wanted_bytes, owner))
            return [
                msgspec.structs.replace(e, lease=replace(e.lease, asked_to_sleep=True))
                if e.lease.owner in chosen
                else e
                for e in entries
            ]

        self._change(change)
        return bool(chosen)

    @contextmanager
    def starting(self, card: Card, timeout_s: float) -> Iterator[None]:
        """The start lease of a card; blocks until it is free. It ends with this process, however that ends.

        Raises:
            EngineFailed: others have been starting for `timeout_s`.
        """
        path = self._folder / f"{card.uuid.replace('/', '_')}.start"
        with path.open("ab") as file:
            deadline = time.monotonic() + timeout_s
            while not _locked(file):
                if time.monotonic() > deadline:
                    raise EngineFailed(
                        f"other engines have been starting on GPU {card.uuid} for {timeout_s:.0f} s"
                    )
                time.sleep(_POLL_S)
            yield

    def _change(self, change: Callable[[list[_Entry]], list[_Entry]]) -> list[_Entry]:
        with (self._folder / "leases.lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # held for microseconds
            path = self._folder / "leases.json"
            text = path.read_bytes() if path.exists() else b"[]"
            entries = [e for e in msgspec.json.decode(text, type=list[_Entry]) if _lives(e)]
            entries = change(entries)
            whole = path.with_suffix(".new")
            whole.write_bytes(msgspec.json.encode(entries))
            whole.replace(path)  # a process that dies here leaves the old one
            return entries


def _locked(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lives(entry: _Entry) -> bool:
    try:
        process = psutil.Process(entry.pid)
        return bool(process.create_time() == entry.started and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
