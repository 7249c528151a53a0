from __future__ import annotations

import asyncio

import pytest

from actors.errors import ClientClosed
from app.api.context import RequestContext


class Opened:
    closed = False

    async def aclose(self) -> None:
        self.closed = True


def context(leave: asyncio.Event) -> RequestContext:
    async def receive():
        await leave.wait()
        return {"type": "http.disconnect"}

    return RequestContext(request_id="r", receive=receive)


async def test_work_that_ends_first_gives_its_result():
    guarded = context(asyncio.Event())

    async def work():
        return 7

    assert await guarded.guard(work()) == 7
    assert not guarded.client_left
    guarded.close()


async def test_an_error_of_the_work_comes_through():
    guarded = context(asyncio.Event())

    async def work():
        raise KeyError("x")

    with pytest.raises(KeyError):
        await guarded.guard(work())
    guarded.close()


async def test_what_was_opened_while_the_client_left_is_closed():
    leave, opened = asyncio.Event(), Opened()
    guarded = context(leave)

    async def work():
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return opened  # it was ready in this very moment

    asyncio.get_running_loop().call_soon(leave.set)
    with pytest.raises(ClientClosed):
        await guarded.guard(work())
    assert opened.closed
    assert guarded.client_left


async def test_what_was_opened_while_the_request_was_cancelled_is_closed():
    opened = Opened()
    guarded = context(asyncio.Event())

    async def work():
        return opened

    task = asyncio.ensure_future(guarded.guard(work()))
    await asyncio.sleep(0)  # the guard waits
    await asyncio.sleep(0)  # the work is done, the guard is about to hear of it
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert opened.closed
    guarded.close()


async def test_a_connection_that_cannot_be_read_counts_as_left():
    async def receive():
        raise OSError("broken")

    guarded = RequestContext(request_id="r", receive=receive)
    with pytest.raises(ClientClosed):
        await guarded.guard(asyncio.Event().wait())
