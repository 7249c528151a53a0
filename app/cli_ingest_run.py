"""One run of `shoal ingest`: sends what the plan says and watches until every file has its outcome.

`app.cli_ingest` makes it and reports. Uploads run a few at a time, each file is attached as soon as it is there,
and the bar moves with the server's progress through each file's chunks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from app.cli_http import Api, ApiError, patiently
from app.cli_ingest_plan import LocalFile, Plan
from app.cli_output import one_line, stderr

PURPOSE = "assistants"  # of OpenAI's: files for vector stores
_UPLOADS = 4  # at a time
_POLL_S = (0.25, 2.0)  # first and longest pause; a pause grows while nothing moves
_QUIET_S = 60.0  # without any movement until the user is told what to look at
_GONE = 404
_FATAL = (401, 403)  # what would be said again of every other file

Outcome = Literal["completed", "unchanged", "skipped", "failed"]


@dataclass(kw_only=True, slots=True)
class Work:
    """One local file on its way to an outcome."""

    file: LocalFile
    file_id: str = ""  # once it is uploaded
    share: float = 0.0  # of its chunks, 0 to 1
    outcome: Outcome | None = None
    why: str = ""


class Run:
    """Carries out one plan.

    Args:
        api: where.
        store_id: the vector store.
        todo: the plan.
        unread: files that could not even be read.
    """

    def __init__(self, api: Api, store_id: str, todo: Plan, unread: Sequence[Work]) -> None:
        self._api = api
        self._files = f"/v1/vector_stores/{store_id}/files"
        self._replaced = todo.replaced
        self._unchanged = [Work(file=file, outcome="unchanged") for file in todo.unchanged]
        self._watched = [Work(file=file, file_id=file_id) for file, file_id in todo.watch]
        self._again = [Work(file=file, file_id=file_id) for file, file_id in todo.again]
        self._new = [Work(file=file) for file in todo.upload]
        self._attached: dict[str, Work] = {work.file_id: work for work in self._watched}
        self._sending = len(self._again) + len(self._new)
        self._uploads = asyncio.Semaphore(_UPLOADS)
        self.work = [*unread, *self._unchanged, *self._watched, *self._again, *self._new]

    async def finish(self) -> None:
        """Return when every file has its outcome.

        Raises:
            CliError: the server went away or refuses everything.
        """
        for work in self._unchanged:
            await self._remove_replaced(work)
        if not self._sending and not self._attached:
            return
        try:
            with _bar() as bar:
                async with asyncio.TaskGroup() as tasks:
                    for work in (*self._again, *self._new):
                        tasks.create_task(self._send(work))
                    tasks.create_task(self._watch(bar))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None  # one that ends the run is enough to say

    def left_early(self) -> str:
        """What to say of work that is left to the server."""
        unsent = sum(work.outcome is None and work.file_id not in self._attached for work in self.work)
        return (
            f"Stopped watching. {len(self._attached)} uploaded files go on being ingested by the server; "
            f"{unsent} were not sent. Run the same command again to go on."
        )

    # --- sending -------------------------------------------------------------------------------------

    async def _send(self, work: Work) -> None:
        try:
            async with self._uploads:
                work.file_id = work.file_id or await self._upload(work.file)
                body = {"file_id": work.file_id, "attributes": work.file.attributes}
                await patiently(lambda: self._api.call("POST", self._files, json=body))
            self._attached[work.file_id] = work
        except ApiError as error:
            if error.status in _FATAL:
                raise
            self._settle(work, "failed", error.message)
        except OSError as error:
            self._settle(work, "failed", in_words(error))
        finally:
            self._sending -= 1

    async def _upload(self, file: LocalFile) -> str:
        # A file object: httpx streams it from the disk, with its length, and rewinds it for another try.
        with file.path.open("rb") as source:
            body = {"files": {"file": (file.path.name, source)}, "data": {"purpose": PURPOSE}}
            uploaded = await patiently(lambda: self._api.call("POST", "/v1/files", **body))
        return str(uploaded["id"])

    # --- watching ------------------------------------------------------------------------------------

    async def _watch(self, bar: Progress) -> None:
        task = bar.add_task("", total=len(self._watched) + self._sending, files="")
        watched = [work for work in self.work if work.outcome is None]
        pause_s, moved_at, before = _POLL_S[0], time.monotonic(), -1.0
        while True:
            await patiently(self._look)
            done = sum(work.share for work in watched)
            settled = sum(work.outcome is not None for work in watched)
            bar.update(task, completed=done, files=f"{settled} of {len(watched)} files")
            if not self._sending and not self._attached:
                return
            if done != before:
                pause_s, moved_at, before = _POLL_S[0], time.monotonic(), done
            elif not self._sending and time.monotonic() - moved_at > _QUIET_S:
                bar.console.print(f"nothing has moved for {_QUIET_S:.0f} s; see: shoal status")
                moved_at = float("inf")
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 1.5, _POLL_S[1])

    async def _look(self) -> None:
        """One listing of what is in progress; whatever is not in it has an outcome to fetch."""
        ended = dict(self._attached)
        if not ended:
            return
        async for wire in self._api.pages(self._files, filter="in_progress"):
            work = ended.pop(wire["id"], None)
            if work is not None:
                work.share = float(wire.get("progress") or 0.0)
        for file_id, work in ended.items():
            try:
                wire = await self._api.call("GET", f"{self._files}/{file_id}")
            except ApiError as error:
                if error.status != _GONE:
                    raise
                wire = {"status": "taken out of the vector store"}
            if wire["status"] != "in_progress":
                await self._end(work, wire)

    async def _end(self, work: Work, wire: dict[str, Any]) -> None:
        del self._attached[work.file_id]
        if wire["status"] == "completed":
            self._settle(work, "completed")
            await self._remove_replaced(work)
        else:
            error = wire.get("last_error") or {}
            self._settle(work, "failed", str(error.get("message") or f"it was {wire['status']}"))

    def _settle(self, work: Work, outcome: Outcome, why: str = "") -> None:
        work.share, work.outcome, work.why = 1.0, outcome, one_line(why, 300)

    async def _remove_replaced(self, work: Work) -> None:
        for file_id in self._replaced.get(work.file.sha256, ()):
            for path in (f"{self._files}/{file_id}", f"/v1/files/{file_id}"):
                try:
                    await self._api.call("DELETE", path)
                except ApiError as error:
                    if error.status != _GONE:  # that is what was wanted
                        raise


def _bar() -> Progress:
    return Progress(
        TextColumn("ingesting"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[files]}"),
        TimeElapsedColumn(),
        console=stderr(),
    )


def in_words(error: OSError) -> str:
    """Why a file cannot be read."""
    return error.strerror or type(error).__name__
