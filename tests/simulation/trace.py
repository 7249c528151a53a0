"""What happened, a line each: faults, messages with what they carry, and the log of the code under test."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import Any

import structlog

from actors.handles import frames
from tests.simulation.loop import VirtualLoop, running_process

_EXPECTED = ("engine_failed",)  # errors that are told of an injected fault


class Trace:
    """Lines with time, step and process.

    Args:
        loop: the time.
        verbose: keep everything; otherwise only faults and errors.

    Attributes:
        lines: in order.
        errors: what the code under test logged as an error: in a simulation it never should.
    """

    def __init__(self, loop: VirtualLoop, *, verbose: bool) -> None:
        self._loop, self._verbose = loop, verbose
        self.lines: list[str] = []
        self.errors: list[str] = []
        level = logging.INFO if verbose else logging.ERROR
        self.wrapper = structlog.make_filtering_bound_logger(level)

    def __call__(self, who: Any, what: str, *details: Any) -> None:
        """Note it."""
        if self._verbose or what == "FAULT":
            told = " ".join(_words(what, detail) for detail in details)
            now = self._loop.time() - 1000.0
            self.lines.append(f"{now:9.4f} #{self._loop.steps:<6} {who!s:10} {what} {told}")

    def log(self, _logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """A structlog processor, the last one."""
        words = " ".join(f"{name}={value}" for name, value in event.items() if name != "component")
        self(running_process(), f"logs {method}", words)
        if method in ("error", "exception", "critical") and event["event"] not in _EXPECTED:
            self.errors.append(f"{running_process()} logged an error: {words} {_traceback(event)}")
        raise structlog.DropEvent


def _traceback(event: MutableMapping[str, Any]) -> str:
    if not event.get("exc_info"):
        return ""
    return str(structlog.processors.format_exc_info(None, "", dict(event)).get("exception", ""))


def _words(what: str, detail: Any) -> str:
    if not isinstance(detail, bytes):
        return str(detail)
    decoders = (
        frames.decode_queue_commands,
        frames.decode_queue_events,
        frames.decode_replica_commands,
        frames.decode_stream_events,
        frames.decode_report,
    )
    for decode in decoders:
        try:
            decoded: Any = decode(detail)
        except Exception:  # noqa: S112  the next one
            continue
        if isinstance(decoded, frames.Report):
            return f"running={decoded.running} produced={decoded.produced_tokens}"
        return "; ".join(_command(one) for one in decoded) or "hello"
    return f"{len(detail)} bytes"


def _command(one: Any) -> str:
    if isinstance(one, frames.Submit):
        t = one.ticket
        return (
            f"submit {t.request_id} {t.principal.tenant}/{t.principal.priority} attempt={t.attempt} "
            f"returning={t.returning} waited={t.waited_s:.3f} timeout={t.timeout_s:.3f}"
        )
    if isinstance(one, frames.Granted):
        return f"granted {one.grant.request_id} on {one.grant.replica_id} attempt={one.grant.attempt}"
    if isinstance(one, frames.Start):
        request = frames.decode_request(one.request)
        told = [len(progress.token_ids) for progress in request.progress]
        return f"start {one.stream}={request.request_id} attempt={one.attempt} progress={told}"
    if isinstance(one, frames.StreamEvent):
        delta = one.delta
        if delta is None:
            return f"{one.stream}: {one.error}"
        return f"{one.stream}: {delta.text!r}{' ' + delta.finish_reason if delta.finish_reason else ''}"
    return str(one)
