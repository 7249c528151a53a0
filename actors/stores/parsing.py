"""Parses documents in a child process with limits on memory, processor, time, pages and expansion.

Owns the child: its clean environment, its pipes, its deadline and its end. `actors.ingestion` calls `Parser`.
The formats are `parse_formats`, which runs in the child only: a document can break that and nothing else.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import msgspec
from pydantic import BaseModel, ConfigDict, Field

from actors.stores.catalog_records import ErrorCode
from actors.telemetry import logger

_ROOT = Path(__file__).parents[2]  # the folder that holds the package `actors`
_READ_BYTES = 1 << 16
_HEAD_BYTES = 4096

_log = logger("stores.parsing")


class ParseLimits(BaseModel):
    """What one document may cost."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    deadline_s: int = Field(default=60, ge=1, le=3600, description="Wall time of parsing one document.")
    cpu_s: int = Field(default=50, ge=1, le=3600, description="Processor time of the same.")
    memory_bytes: int = Field(default=1 << 30, ge=1 << 27, description="Address space of the child process.")
    max_source_bytes: int = Field(default=64 << 20, ge=1, description="Largest file that is parsed.")
    max_pages: int = Field(default=5000, ge=1, description="Pages of a PDF.")
    max_unpacked_bytes: int = Field(default=256 << 20, ge=1, description="Unpacked size of a DOCX.")
    max_expansion: int = Field(
        default=100, ge=2, description="Unpacked over packed size of a DOCX above 10 MB unpacked."
    )
    max_text_chars: int = Field(default=10_000_000, ge=1, description="Characters of text of one document.")


class BadDocument(Exception):
    """The document cannot be ingested; `code` is OpenAI's `last_error.code`, the message is for the user."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class _Refusal(msgspec.Struct, frozen=True):
    """The first line of the child's answer, when no text follows."""

    code: ErrorCode
    kind: str  # of the library's error, for the log
    message: str


class ParserKilled(Exception):
    """The child was killed from outside before it answered: says nothing about the document."""


class Parser:
    """Text of documents, one child process per call.

    Args:
        limits: of each document.
    """

    def __init__(self, limits: ParseLimits) -> None:
        self._limits = limits

    async def __call__(self, source: AsyncIterator[bytes], filename: str) -> str:
        """The text of a document.

        Args:
            source: its bytes, in pieces.
            filename: decides the type, checked against the first bytes.

        Raises:
            BadDocument: wrong type, damaged, encrypted, empty, or over a limit.
            ParserKilled: the child was killed from outside.
        """
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-S",  # the paths are given: reading .pth files costs as much as all the rest of the start
            "-c",  # not -m, whose `runpy` is slower to import than all that the child needs
            "from actors.stores.parse_child import main; main()",
            *(f"{name}={number}" for name, number in self._limits.model_dump().items()),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={"PYTHONPATH": os.pathsep.join([str(_ROOT), *filter(None, sys.path)]), "LC_ALL": "C.UTF-8"},
            cwd="/",
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(self._limits.deadline_s):
                answer = await self._converse(child, source, filename)
                status = await child.wait()
        except TimeoutError:
            raise BadDocument(
                "invalid_file", f"reading the file took longer than {self._limits.deadline_s} s"
            ) from None
        finally:
            await _end(child)
        return self._text(status, answer, filename)

    async def _converse(
        self, child: asyncio.subprocess.Process, source: AsyncIterator[bytes], filename: str
    ) -> bytes:
        feeding = asyncio.ensure_future(self._feed(child, source, filename))
        try:
            answer = await self._answer(child)
            # A child that answered or died reads no more; a source that failed is the caller's to know.
            await feeding
        finally:
            feeding.cancel()
            await asyncio.wait([feeding])
        return answer

    async def _feed(
        self, child: asyncio.subprocess.Process, source: AsyncIterator[bytes], filename: str
    ) -> None:
        assert child.stdin is not None  # noqa: S101  asked for above; for the type checker
        left = self._limits.max_source_bytes
        try:
            child.stdin.write(filename.replace("\n", " ").encode() + b"\n")
            async for piece in source:
                left -= len(piece)
                if left < 0:
                    most = self._limits.max_source_bytes >> 20
                    raise BadDocument("invalid_file", f"the file is larger than the {most} MiB that are read")
                child.stdin.write(piece)
                await child.stdin.drain()
        except ConnectionError:
            return  # it died or answered early: its status says which
        finally:
            child.stdin.close()

    async def _answer(self, child: asyncio.subprocess.Process) -> bytes:
        assert child.stdout is not None  # noqa: S101  as above
        most = 4 * self._limits.max_text_chars + _HEAD_BYTES
        answer = bytearray()
        while piece := await child.stdout.read(_READ_BYTES):
            answer += piece
            if len(answer) > most:
                raise BadDocument("invalid_file", "the file holds too much text")
        return bytes(answer)

    def _text(self, status: int, answer: bytes, filename: str) -> str:
        if status == -signal.SIGKILL:
            raise ParserKilled("the parser was killed before it was done")
        if status == -signal.SIGXCPU:
            raise BadDocument(
                "invalid_file", f"reading the file took more than {self._limits.cpu_s} s of processor time"
            )
        head, found, text = answer.partition(b"\n")
        if status != 0 or not found:  # it crashed, which only a damaged document brings about
            _log.warning("parser_failed", status=status, suffix=Path(filename).suffix)
            raise BadDocument("invalid_file", "the file is damaged and cannot be read")
        if not head:
            return text.decode()
        names = _Refusal.__struct_fields__
        refusal = msgspec.convert(dict(zip(names, head.decode().split("\t", 2), strict=True)), _Refusal)
        _log.info("document_refused", suffix=Path(filename).suffix, reason=refusal.message, kind=refusal.kind)
        raise BadDocument(refusal.code, refusal.message)


async def _end(child: asyncio.subprocess.Process) -> None:
    if child.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        await asyncio.shield(child.wait())
