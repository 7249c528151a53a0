"""Serve handles for unit tests: in-process actors behind `.options(...).remote(...)`, which can die and come back.

A streaming call runs the actor's generator in a task of its own and hands its items over, as Serve does; `kill`
breaks all open calls as a process that is gone does.
"""

from __future__ import annotations

import asyncio
from typing import Any

from ray.serve.exceptions import RequestCancelledError

_END = object()


class Gone(Exception):
    """Any exception of Serve's that `actors.handles.call.ours` does not know better."""


class Deployment:
    """One actor; `calls` lists the methods that were called."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.calls: list[tuple[str, tuple, dict]] = []
        self.streams: list[Stream] = []
        self.before_call = lambda method: None  # may raise, or return an awaitable to wait for
        self._alive = asyncio.Event()
        self._alive.set()

    def handle(self, deployment: str = "", app_name: str = "m") -> Handle:
        return Handle(self, app_name, {})

    def kill(self, error: BaseException | None = None) -> None:
        """Every open stream breaks; calls wait for the next actor."""
        self._alive.clear()
        self.break_streams(error)

    def break_streams(self, error: BaseException | None = None) -> None:
        streams, self.streams = self.streams, []
        for stream in streams:
            stream.fail(error or Gone("died"))

    def revive(self, actor: Any) -> None:
        self.actor = actor
        self._alive.set()

    async def reach(self, method: str) -> Any:
        await self._alive.wait()
        if (waiting := self.before_call(method)) is not None:
            await waiting
        return getattr(self.actor, method)


class Handle:
    def __init__(self, deployment: Deployment, app_name: str, options: dict) -> None:
        self.deployment, self.app_name, self._options = deployment, app_name, options

    def options(self, **options: Any) -> Handle:
        return Handle(self.deployment, self.app_name, options)

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        assert self._options["_by_reference"] is False
        method = self._options["method_name"]
        self.deployment.calls.append((method, args, kwargs))
        if self._options.get("stream"):
            return Stream(self.deployment, method, args, kwargs)
        return self._call(method, args, kwargs)

    async def _call(self, method: str, args: tuple, kwargs: dict) -> Any:
        return await (await self.deployment.reach(method))(*args, **kwargs)


class Stream:
    def __init__(self, deployment: Deployment, method: str, args: tuple, kwargs: dict) -> None:
        self._items: asyncio.Queue[Any] = asyncio.Queue()
        self._deployment = deployment
        deployment.streams.append(self)
        self._task = asyncio.get_running_loop().create_task(self._run(method, args, kwargs))
        self.cancelled = False

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> bytes:
        item = await self._items.get()
        if item is _END:
            raise StopAsyncIteration
        if isinstance(item, BaseException):
            raise item
        return item

    def cancel(self) -> None:
        self.cancelled = True
        self.fail(RequestCancelledError("cancelled"))

    def fail(self, error: BaseException) -> None:
        self._task.cancel()
        self._items.put_nowait(error)

    async def _run(self, method: str, args: tuple, kwargs: dict) -> None:
        try:
            generator = (await self._deployment.reach(method))(*args, **kwargs)
            try:
                async for item in generator:
                    self._items.put_nowait(item)
            finally:
                await generator.aclose()
        except Exception as error:
            self._items.put_nowait(error)
        else:
            self._items.put_nowait(_END)


async def settle(turns: int = 30) -> None:
    """Let everything that is ready run."""
    for _ in range(turns):
        await asyncio.sleep(0)
