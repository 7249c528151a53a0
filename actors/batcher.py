"""Runs batches: what one job of a `JobRunner` does with 50,000 lines, in bounded memory and through crashes.

The input file is read as a stream, as often as it takes; some lines run at a time; results are gathered into parts,
small files in the document store, and a part counts once it is noted together with the lines in it. Whoever takes the
job after a crash runs the lines that stand in no noted part. So a line may run twice, and is answered once. The parts
become the output and the error file at the end. What a line asks for and how its answer looks is a `LineApp`'s.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast

import msgspec

from actors.errors import FailedEverywhere, NotFound, ShoalError
from actors.policies.batches import (
    KIND,
    MOST_LINE_BYTES,
    MOST_LINES,
    WINDOW_S,
    BadLine,
    BatchTask,
    parse_line,
)
from actors.policies.webhooks import EventType
from actors.stores.batches import BatchLog, Part
from actors.stores.catalog import Catalog
from actors.stores.catalog_records import FileRecord
from actors.stores.documents import DocumentStore
from actors.stores.job_records import Lease, LeaseLost
from actors.webhooks import WebhookOutbox

_NOTE_EVERY_S = 1.0  # what a crash makes run again
_PART_BYTES = 4_000_000
_MOST_BUFFERED_BYTES = 16_000_000  # results that wait for a slow store; then lines wait
_TRIES = 5  # of a line that fails in ways that may pass
_MOST_PAUSE_S = 30.0
_LINES_PER_TURN = 256  # a few milliseconds; then others have their turn
_SHOWN_ERRORS = 100  # of an invalid file

Fields = dict[str, str | int | bytes]
End = Literal["completed", "expired", "cancelled"]
Outcome = End | Literal["failed", "lost"]


_EVENTS: dict[End, EventType] = {
    "completed": "batch.completed", "expired": "batch.expired", "cancelled": "batch.cancelled",
}  # fmt: skip


class LineApp(Protocol):
    """Makes answers of lines; `app.batch_lines` in production."""

    async def answer(self, task: BatchTask, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """The body of the answer to one line.

        Raises:
            ShoalError: it cannot be answered, or not now.
        """

    def error_body(self, error: ShoalError) -> Mapping[str, Any]:
        """The body of an answer that is an error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchJob:
    """A batch and the right to note its results."""

    lease: Lease
    task: BatchTask


class Batcher:
    """Runs batches; holds no state between them.

    Args:
        log: checkpoints.
        catalog: where the files are known.
        documents: where they are.
        app: answers lines.
        webhooks: tells of their ends.
        concurrency: lines of one batch at the same time.
    """

    kind = KIND
    subject = "this batch"

    def __init__(  # noqa: PLR0913  what it is put together from
        self,
        *,
        log: BatchLog,
        catalog: Catalog,
        documents: DocumentStore,
        app: LineApp,
        webhooks: WebhookOutbox,
        concurrency: int,
    ) -> None:
        self._log = log
        self._catalog = catalog
        self._documents = documents
        self._app = app
        self._webhooks = webhooks
        self._concurrency = concurrency

    def task(self, lease: Lease) -> BatchJob:
        """What a job asks for."""
        return BatchJob(lease=lease, task=msgspec.convert(lease.payload, BatchTask))

    async def run(self, tenant: str, job: BatchJob) -> Outcome:
        """Run what has no result yet, then write the files and finish the job.

        Raises:
            ShoalError: a store is down or full; another attempt goes on from here.
        """
        try:
            return await self._run(tenant, job)
        except LeaseLost:
            return "lost"

    async def give_up(self, tenant: str, job: BatchJob, message: str) -> None:
        """Show it as failed, and keep it among the dead letters."""
        errors = _errors([{"code": "server_error", "message": message, "line": None, "param": None}])
        with suppress(LeaseLost):
            fields: Fields = {"status": "failed", "failed_at": _now(), "errors": errors}
            await self._webhooks.announce(tenant, "batch.failed", job.task.batch_id)
            await self._log.note(job.lease, fields, outcome="dead", error=message)

    async def _run(self, tenant: str, job: BatchJob) -> Outcome:
        lease, task = job.lease, job.task
        fields: Fields
        if (end := await self._log.end(lease)) is not None:
            return await self._close(tenant, job, cast(End, end))
        status, total = await self._log.state(lease)
        if not total and status != "cancelling":
            total, problems = await self._validate(tenant, task)
            if problems:
                fields = {"status": "failed", "failed_at": _now(), "errors": _errors(problems)}
                await self._webhooks.announce(tenant, "batch.failed", task.batch_id)
                await self._log.note(lease, fields, outcome="done")
                return "failed"
            fields = {"status": "in_progress", "in_progress_at": _now(), "total": total}
            status = await self._log.note(lease, fields)
        work = _Work(deadline=time.monotonic() + WINDOW_S - lease.age_s, done=await self._log.done(lease))
        if status != "cancelling" and time.monotonic() < work.deadline:
            await self._work(tenant, job, work)
        return await self._finish(tenant, job, work)

    # --- the input -----------------------------------------------------------------------------------

    async def _validate(self, tenant: str, task: BatchTask) -> tuple[int, list[dict[str, Any]]]:
        """Number of lines, and what makes the file invalid."""
        problems: list[dict[str, Any]] = []
        seen: set[int] = set()
        number = 0

        def wrong(line: int | None, error: BadLine) -> None:
            if len(problems) < _SHOWN_ERRORS:
                shown = {"code": error.code, "message": error.message, "param": error.param, "line": line}
                problems.append(shown)

        try:
            async for _, raw in self._lines(tenant, task.input_file_id):
                number += 1
                try:
                    mark = hash(parse_line(raw, task.endpoint).custom_id)
                except BadLine as error:
                    wrong(number, error)
                    continue
                if mark in seen:
                    message = "custom_id stands in an earlier line"
                    wrong(number, BadLine("duplicate_custom_id", message, "custom_id"))
                seen.add(mark)
        except (BadLine, NotFound) as error:  # of the file as a whole
            code = error.code if isinstance(error, BadLine) else "input_file_not_found"
            wrong(None, BadLine(code, error.message))
        if not number and not problems:
            wrong(None, BadLine("empty_file", "the input file has no lines"))
        return number, problems

    async def _lines(self, tenant: str, file_id: str) -> AsyncGenerator[tuple[int, bytes], None]:
        """The lines that are not blank, with their places among them.

        Raises:
            BadLine: one is too long, or they are too many.
        """
        held, index = b"", 0
        async with aclosing(_and_last(self._documents.read_source(tenant, file_id))) as pieces:
            async for piece in pieces:
                *whole, held = (held + piece).split(b"\n") if piece is not None else [held, b""]
                if len(held) > MOST_LINE_BYTES:
                    raise BadLine("line_too_long", f"line {index + 1} has more than {MOST_LINE_BYTES} bytes")
                for raw in whole:
                    if not raw.strip():
                        continue
                    if index >= MOST_LINES:
                        raise BadLine("too_many_lines", f"a batch has at most {MOST_LINES} lines")
                    yield index, raw
                    index += 1
                    if index % _LINES_PER_TURN == 0:
                        await asyncio.sleep(0)

    # --- the work ------------------------------------------------------------------------------------

    async def _work(self, tenant: str, job: BatchJob, work: _Work) -> None:
        """Run lines until none is left, the window closes, or the batch is cancelled."""
        async with aclosing(self._lines(tenant, job.task.input_file_id)) as lines:
            taking = asyncio.Lock()
            workers = [
                asyncio.create_task(self._take_lines(job, work, lines, taking))
                for _ in range(self._concurrency)
            ]
            try:
                await self._note_until_done(job, work, workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        await self._note(job, work)

    async def _note_until_done(self, job: BatchJob, work: _Work, workers: list[asyncio.Task[None]]) -> None:
        while any(not worker.done() for worker in workers):
            await asyncio.wait(workers, timeout=_NOTE_EVERY_S, return_when=asyncio.FIRST_EXCEPTION)
            for worker in workers:
                if worker.done():
                    worker.result()
            if await self._note(job, work) == "cancelling" or time.monotonic() > work.deadline:
                return

    async def _take_lines(
        self, job: BatchJob, work: _Work, lines: AsyncIterator[tuple[int, bytes]], taking: asyncio.Lock
    ) -> None:
        while True:
            async with taking:
                found = await anext(lines, None)
            if found is None:
                return
            index, raw = found
            if work.is_done(index):
                continue
            await work.has_room.wait()
            work.add(index, *await self._answer(job.task, raw))

    async def _answer(self, task: BatchTask, raw: bytes) -> tuple[bool, bytes]:
        """Whether a line was answered well, and its line of the output or error file."""
        line = parse_line(raw, task.endpoint)  # it was checked before
        request_id = f"batch_req_{uuid.uuid4().hex}"
        failures = 0
        while True:
            try:
                body = await self._app.answer(task, line.body)
                return True, _result(request_id, line.custom_id, 200, body)
            except ShoalError as error:
                # Limits and overload are a matter of patience; what breaks is tried a few times.
                patient = error.status_code == 429
                failures += not patient
                if not error.retryable or isinstance(error, FailedEverywhere) or failures >= _TRIES:
                    body = self._app.error_body(error)
                    return False, _result(request_id, line.custom_id, error.status_code, body)
                pause_s = max(error.retry_after_s or 0.0, min(0.5 * 2.0**failures, _MOST_PAUSE_S))
                await asyncio.sleep(pause_s * (0.5 + random.random()))

    async def _note(self, job: BatchJob, work: _Work) -> str:
        """Store what has come since the last time, and note it."""
        status = ""
        while not status or work.buffered_bytes > _PART_BYTES:
            good, bad = work.take()
            for kind, results in (("good", good), ("bad", bad)):
                if results:
                    name = f"{kind}-{job.lease.job_id}-{uuid.uuid4().hex}"
                    await self._log.plan(job.lease, name)
                    await self._store(job.lease.tenant, name, [line for _, line in results])
                    part = Part(
                        name=name,
                        completed=len(results) if kind == "good" else 0,
                        failed=len(results) if kind == "bad" else 0,
                        lines=[index for index, _ in results],
                    )
                    await self._log.note(job.lease, part=part)
            status = await self._log.note(job.lease)
        return status

    async def _store(self, tenant: str, name: str, lines: list[bytes]) -> None:
        async def pieces() -> AsyncIterator[bytes]:
            yield b"".join(lines)

        await self._documents.put_source(tenant, name, pieces())

    # --- the end -------------------------------------------------------------------------------------

    async def _finish(self, tenant: str, job: BatchJob, work: _Work) -> Outcome:
        lease = job.lease
        if time.monotonic() > work.deadline:
            await self._expire_rest(tenant, job, work)
        end: End = "expired" if time.monotonic() > work.deadline else "completed"
        if await self._log.note(lease, {"status": "finalizing", "finalizing_at": _now()}) == "cancelling":
            end = "cancelled"
        parts = await self._log.parts(lease)
        fields: Fields = {"end": end}
        for kind, name in (("good", "output"), ("bad", "error")):
            names = [part for part in parts if part.startswith(kind)]
            if names:
                fields[f"{name}_file_id"] = await self._publish(tenant, job, name, names)
        await self._log.note(lease, fields)  # from here on the parts are not needed
        return await self._close(tenant, job, end)

    async def _close(self, tenant: str, job: BatchJob, end: End) -> Outcome:
        for part in await self._log.planned(job.lease):
            await self._documents.delete_source(tenant, part)
        await self._webhooks.announce(tenant, _EVENTS[end], job.task.batch_id)
        await self._log.note(job.lease, {"status": end, f"{end}_at": _now()}, outcome="done")
        return end

    async def _publish(self, tenant: str, job: BatchJob, name: str, parts: list[str]) -> str:
        """Join parts to one file. Its id follows from the batch: doing it again writes the same file."""
        file_id = f"file-{job.lease.job_id}-{name}"

        async def pieces() -> AsyncIterator[bytes]:
            for part in parts:
                async for piece in self._documents.read_source(tenant, part):
                    yield piece

        stored = await self._documents.put_source(tenant, file_id, pieces())
        record = FileRecord(
            id=file_id,
            filename=f"{job.task.batch_id}_{name}.jsonl",
            bytes=stored.size_bytes,
            purpose="batch_output",
            created_at=0,
            sha256=stored.sha256,
        )
        await self._catalog.files.add(tenant, record)
        return file_id

    async def _expire_rest(self, tenant: str, job: BatchJob, work: _Work) -> None:
        message = "this request was not executed before the batch's completion window closed"
        error = {"code": "batch_expired", "message": message}
        async for index, raw in self._lines(tenant, job.task.input_file_id):
            if not work.is_done(index):
                line = parse_line(raw, job.task.endpoint)
                shown = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": line.custom_id, "response": None}
                work.add(index, False, _line({**shown, "error": error}))  # noqa: FBT003  as `_answer` has it
            if work.buffered_bytes > _PART_BYTES:
                await self._note(job, work)
        await self._note(job, work)


@dataclass(kw_only=True)
class _Work:
    """Results between two checkpoints."""

    deadline: float  # monotonic
    done: bytes  # bitmap: lines that had a result when this owner began
    has_room: asyncio.Event = field(default_factory=asyncio.Event)
    buffered_bytes: int = 0

    def __post_init__(self) -> None:
        self._added: set[int] = set()
        self._results: list[tuple[bool, int, bytes]] = []
        self.has_room.set()

    def is_done(self, index: int) -> bool:
        byte = self.done[index // 8] if index // 8 < len(self.done) else 0
        return bool(byte >> (7 - index % 8) & 1) or index in self._added

    def add(self, index: int, good: bool, line: bytes) -> None:
        self._added.add(index)
        self._results.append((good, index, line))
        self.buffered_bytes += len(line)
        if self.buffered_bytes > _MOST_BUFFERED_BYTES:
            self.has_room.clear()

    def take(self) -> tuple[list[tuple[int, bytes]], list[tuple[int, bytes]]]:
        """Everything, answered and failed."""
        results, self._results = self._results, []
        self.buffered_bytes = 0
        self.has_room.set()
        good = [(index, line) for well, index, line in results if well]
        return good, [(index, line) for well, index, line in results if not well]


async def _and_last(pieces: AsyncIterator[bytes]) -> AsyncGenerator[bytes | None, None]:
    async for piece in pieces:
        yield piece
    yield None


def _result(request_id: str, custom_id: str, status: int, body: Mapping[str, Any]) -> bytes:
    response = {"status_code": status, "request_id": request_id, "body": body}
    return _line({"id": request_id, "custom_id": custom_id, "response": response, "error": None})


def _line(value: Mapping[str, Any]) -> bytes:
    return msgspec.json.encode(value) + b"\n"


def _errors(problems: list[dict[str, Any]]) -> bytes:
    return msgspec.json.encode({"object": "list", "data": problems})


def _now() -> int:
    return int(time.time())
