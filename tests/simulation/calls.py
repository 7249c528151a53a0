"""One call between two simulated processes, from either end: unary, or a stream of items."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

from ray.exceptions import ActorDiedError
from ray.serve.exceptions import RequestCancelledError

from actors.handles import frames
from tests.simulation.loop import Process, State, current_process

if TYPE_CHECKING:
    from tests.simulation.network import Network

QUEUE = "BatchingQueue"
_END = object()


class Server(Protocol):
    """A process that can be called."""

    process: Process
    actor: Any


class Call:
    """One call, from either end."""

    def __init__(
        self, network: Network, deployment: str, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.network, self.deployment, self.method = network, deployment, method
        self.args, self.kwargs = args, kwargs
        self.caller = current_process()
        self.server: Server | None = None
        self.task: asyncio.Task[None] | None = None

    def go_to(self, server: Server) -> None:
        self.server = server
        line: tuple[Any, Any] = (self.caller, server.process)
        if isinstance(self, Stream) or self.network.overtaking:
            line = (self, server.process)  # a connection of its own: commands may come before or after it
        self.network.post(line, self._arrive)

    def fail(self, error: BaseException) -> None:
        """The caller sees `error`."""
        raise NotImplementedError

    def caller_died(self) -> None:
        """Nobody waits for the answer; the server learns it a little later."""
        self._over()
        if self.task is not None:
            self.network.post((self, "cancel"), self._cancel_task, 0.3)

    def server_died(self) -> None:
        self._over()
        self.network.post((self, "answer"), self._fail_with_server, 0.1)

    def _fail_with_server(self) -> None:
        if self.deployment != QUEUE and self.caller.state is not State.DEAD:
            assert self.network.router is not None
            self.network.router.is_dead(self.caller, self.kwargs["replica"])
        self.fail(ActorDiedError())

    def _arrive(self) -> None:
        server = self.server
        assert server is not None
        if self not in self.network.open or server.process.state is State.DEAD:
            return  # `server_died` has told the caller
        self.network.trace(self.caller, f"-> {server.process}", self.method, *self.args)
        if self.deployment == QUEUE and self.method == "send":
            for command in frames.decode_queue_commands(self.args[1]):
                self.network.on_command(command)
        self.task = self.network.loop.create_task(self._serve(server.actor), context=server.process.context)

    async def _serve(self, actor: Any) -> None:
        raise NotImplementedError

    def _cancel_task(self) -> None:
        if self.task is not None and self.server is not None:
            self.network.loop.call_soon(self.task.cancel, context=self.server.process.context)

    def _over(self) -> None:
        self.network.open.pop(self, None)


class Unary(Call):
    """Awaited once."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._answer: asyncio.Future[Any] = self.network.loop.create_future()

    def __await__(self) -> Any:
        return self._answer.__await__()

    def fail(self, error: BaseException) -> None:
        self._over()
        if not self._answer.done():
            self._answer.set_exception(error)
            self._answer.exception()  # nobody may be there to look at it

    async def _serve(self, actor: Any) -> None:
        try:
            value = await getattr(actor, self.method)(*self.args, **self.kwargs)
        except Exception as error:
            caught = error
            self.network.post((self, "answer"), lambda: self.fail(caught))
        else:
            self.network.post((self, "answer"), lambda: self._succeed(value))

    def _succeed(self, value: Any) -> None:
        if self not in self.network.open:
            return  # its server died with the answer under way
        self._over()
        if not self._answer.done():
            self._answer.set_result(value)


class Stream(Call):
    """Read item by item; `cancel` ends it on both sides."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._items: deque[Any] = deque()
        self._wake: asyncio.Future[None] | None = None
        self._broken = False

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> bytes:
        while not self._items:
            self._wake = self.network.loop.create_future()
            await self._wake
        item = self._items.popleft()
        if item is _END:
            raise StopAsyncIteration
        if isinstance(item, BaseException):
            raise item
        return item

    def cancel(self) -> None:
        self._over()
        self._put(RequestCancelledError("cancelled"))
        if self.task is not None:
            self.network.post((self, "cancel"), self._cancel_task)

    def break_alone(self) -> None:
        """The connection is cut; both ends live and learn it, each in its own time."""
        self._over()
        self._broken = True
        self.network.post((self, "answer"), lambda: self._put(RequestCancelledError("cut")))
        self.network.post((self, "cancel"), self._cancel_task)

    def server_died(self) -> None:
        self._broken = self.network.rng.random() < 0.5  # what is under way arrives, or is lost with it
        super().server_died()

    def fail(self, error: BaseException) -> None:
        self._over()
        self._put(error)

    async def _serve(self, actor: Any) -> None:
        try:
            generator = getattr(actor, self.method)(*self.args, **self.kwargs)
            try:
                async for item in generator:
                    self._send(item)
            finally:
                await generator.aclose()
        except Exception as error:
            self._send(error)
        else:
            self._send(_END)

    def _send(self, item: Any) -> None:
        self.network.post((self, "answer"), lambda: self._arrived(item))

    def _arrived(self, item: Any) -> None:
        if self._broken:
            return
        assert self.server is not None
        if item is _END or isinstance(item, BaseException):
            self._over()
        elif self.caller.state is not State.DEAD:
            self.network.trace(self.server.process, f"=> {self.caller}", self.method, item)
        self._put(item)

    def _put(self, item: Any) -> None:
        self._items.append(item)
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)
