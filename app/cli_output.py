"""What every `shoal` command shares: exit codes, errors in words, and text that is safe to print.

The commands raise `CliError`; `app.cli` prints it and exits. Answers go to stdout, everything about them
(progress, notes, errors) to stderr, so that stdout can be piped.
"""

from __future__ import annotations

import enum
from typing import Any

import msgspec
import typer
from rich.console import Console


class ExitCode(enum.IntEnum):
    """What `shoal` exits with; 2 is typer's for a wrong command line."""

    OK = 0
    FAILED = 1  # refused by the server, some file failed, or a part is not ready
    USAGE = 2
    UNREACHABLE = 3  # nothing answers at the address
    INTERRUPTED = 130  # Ctrl-C


class CliError(Exception):
    """Ends the command.

    Args:
        message: what is wrong and what to do, on one line.
        exit_code: what to exit with.
        retry_after_s: set where nothing was done and the same call may be made again, after so long.
    """

    def __init__(
        self, message: str, exit_code: ExitCode = ExitCode.FAILED, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.exit_code = exit_code
        self.retry_after_s = retry_after_s


# C0, DEL and C1 but tab and line feed: documents and models must not drive the terminal.
_CONTROL = dict.fromkeys([*range(0x09), *range(0x0B, 0x20), *range(0x7F, 0xA0)])


def printable(text: str) -> str:
    """Text from a server or a document, without what a terminal would obey."""
    return text.translate(_CONTROL)


def one_line(text: str, most_chars: int) -> str:
    """The start of `text` on one line, with an ellipsis where it is cut."""
    line = " ".join(printable(text).split())
    return line if len(line) <= most_chars else f"{line[: most_chars - 1].rstrip()}…"


def say(text: str) -> None:
    """A note on stderr."""
    typer.echo(printable(text), err=True)


def stdout() -> Console:
    """For tables. Made when it is used: tests and pipes replace the stream."""
    return Console(highlight=False)


def stderr() -> Console:
    """For progress bars."""
    return Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """`value` as indented JSON on stdout."""
    typer.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())
