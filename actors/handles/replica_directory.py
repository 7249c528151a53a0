"""Which replicas this process's routers know, by application, and who wants to hear when one leaves.

`GrantRouter` writes it from the router's event loop, which may be another thread than the actor's own;
`actors.handles.llm` reads it to close an idle bus once its replica has left the router, so that a draining
replica ends. One directory per process: the routers of one process share it through `DIRECTORY`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

Listener = Callable[[frozenset[str]], None]


class ReplicaDirectory:
    """Replica ids by application; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ids: dict[str, frozenset[str]] = {}
        self._seen: dict[str, set[str]] = {}
        self._listeners: dict[str, list[tuple[asyncio.AbstractEventLoop, Listener]]] = {}

    def update(self, app_name: str, replica_ids: frozenset[str]) -> None:
        """Set the replicas an application has now and tell its listeners, each on its own loop."""
        with self._lock:
            self._ids[app_name] = replica_ids
            self._seen.setdefault(app_name, set()).update(replica_ids)
            listeners = list(self._listeners.get(app_name, ()))
        for loop, listener in listeners:
            if not loop.is_closed():
                loop.call_soon_threadsafe(listener, replica_ids)

    def subscribe(self, app_name: str, listener: Listener) -> None:
        """Call `listener` with the new ids on the running loop whenever they change."""
        with self._lock:
            self._listeners.setdefault(app_name, []).append((asyncio.get_running_loop(), listener))

    def has_left(self, app_name: str, replica_id: str) -> bool:
        """Was this replica in the application's router, and is not any more? One not yet heard of has not left."""
        with self._lock:
            here, seen = self._ids.get(app_name, frozenset()), self._seen.get(app_name, set())
            return replica_id in seen and replica_id not in here


DIRECTORY = ReplicaDirectory()
