"""Calls over Serve handles with a time-out, and errors that are ours.

Everyone in `actors.handles` goes through `result`; nobody else sees Ray's exceptions. An exception raised by
another actor arrives as `RayTaskError`, whose text is a remote traceback with pid and address: only its cause
travels on.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Coroutine
from typing import Any, NoReturn, TypeVar

from ray import exceptions as ray_errors
from ray import serve
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError

from actors.errors import DeadlineExceeded, ReplicaGone, ShoalError, Unavailable

T = TypeVar("T")

# A replica that died, is unreachable or was cancelled under the call: the caller may try elsewhere.
_GONE = (
    ray_errors.ActorDiedError,
    ray_errors.ActorUnavailableError,
    ray_errors.WorkerCrashedError,
    ray_errors.NodeDiedError,
    ray_errors.TaskCancelledError,
    RequestCancelledError,
)


async def result(response: Awaitable[Any], *, timeout_s: float, what: str) -> Any:
    """Await one handle response.

    Args:
        response: what `.remote()` returned.
        timeout_s: the longest wait; then the call is cancelled.
        what: the stage's name for messages ("retriever").

    Raises:
        ShoalError: the callee's own error, or
            DeadlineExceeded: no answer in time;
            ReplicaGone: the replica died or left under the call;
            Unavailable: the deployment has no replica that could answer, or broke.
    """
    try:
        # Not wait_for: on 3.11 it can swallow a cancellation that races with the answer.
        async with asyncio.timeout(timeout_s):
            return await response
    except TimeoutError:
        raise DeadlineExceeded(f"no answer from the {what} within {timeout_s:g} s") from None
    except asyncio.CancelledError:
        if cancelled():
            raise
        raise ReplicaGone(f"the {what} cancelled the call") from None
    except Exception as error:
        raise_ours(error, what)


async def answered(stream: Any, *, taken_s: float, timeout_s: float, what: str) -> Any:
    """Await a method that yields twice: at once, to say that it has the call, and its answer.

    While there is no replica, Serve's router would hold a call without a bound, and a unary one does not tell
    whether anybody works on it.

    Args:
        stream: what `.remote()` returned.
        taken_s: the longest wait for the first item.
        timeout_s: the longest wait for both.
        what: the stage's name for messages ("embedder").

    Raises:
        ShoalError: the callee's own error, or
            Unavailable: no replica took it in time, or it broke;
            DeadlineExceeded: no answer in time;
            ReplicaGone: the replica died or left under the call.
    """
    deadline = asyncio.get_running_loop().time() + timeout_s
    try:
        try:
            await result(anext(stream), timeout_s=min(taken_s, timeout_s), what=what)
        except DeadlineExceeded:
            raise Unavailable(f"the {what} is not available", retry_after_s=1.0) from None
        left_s = max(deadline - asyncio.get_running_loop().time(), 0.001)
        return await result(anext(stream), timeout_s=left_s, what=what)
    except BaseException:
        stream.cancel()
        raise


def cancelled() -> bool:
    """Was the current task cancelled, or does a `CancelledError` come from the other end of a call?

    Serve raises one when the callee or the connection cancelled the call, which is a failure like any other.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def detached(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """A task that belongs to no request, for connections that many requests share.

    Serve takes every call made in a request's context for a child of that request and cancels it when the
    request's client leaves; a shared connection would break for everybody when its first user leaves.
    """
    return asyncio.get_running_loop().create_task(work, context=contextvars.Context())


def deployment_handle(deployment: str, app_name: str) -> Any:
    """A handle made without asking the controller, which would block the event loop.

    Keep it: every such handle has a router and a long poll of its own, shared by what `.options()` derives.
    """
    return serve.get_deployment_handle(deployment, app_name=app_name, _check_exists=False)


def raise_ours(error: Exception, what: str) -> NoReturn:
    """Raise the `ShoalError` that `error` stands for."""
    raise ours(error, what) from None


def ours(error: BaseException, what: str) -> ShoalError:
    """The `ShoalError` that an exception from a handle stands for; its text never carries a traceback."""
    if isinstance(error, ShoalError):
        return error
    if isinstance(error, ray_errors.RayTaskError):
        cause = error.cause
        return cause if isinstance(cause, ShoalError) else Unavailable(f"the {what} failed")
    if isinstance(error, _GONE):
        return ReplicaGone(f"the {what} went away during the call")
    if isinstance(error, BackPressureError | DeploymentUnavailableError):
        return Unavailable(f"the {what} is not available", retry_after_s=1.0)
    return Unavailable(f"the {what} failed")
