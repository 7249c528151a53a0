"""The child process that parses one document.

Started by `actors.stores.parsing` and by nobody else. It reads the limits from its arguments (`name=number`),
limits itself, reads one line (the file name) and the document from stdin, and answers on stdout with one line
(code, kind of error and message, split by tabs; empty when all went well) and after it the text in UTF-8.

Starting is most of what a small document costs, so it imports next to nothing: 13 ms of processor time, where
`json`, `re`, `typing`, `pathlib` and `runpy` would make it 33.
"""

from __future__ import annotations

import os
import resource
import sys

from actors.stores.parse_formats import Refused, extract

TYPE_CHECKING = False  # of `typing`, which takes 3 ms to import
if TYPE_CHECKING:
    from collections.abc import Callable


def main() -> None:
    """Parse the document on stdin; a refusal is an answer like any other."""
    pairs = (argument.partition("=") for argument in sys.argv[1:])
    limits = {name: int(number) for name, _, number in pairs}
    answer_fd = os.dup(1)
    os.dup2(2, 1)  # what a library prints must not mix with the answer
    _limit(limits)
    filename = sys.stdin.buffer.readline().decode().rstrip("\n")
    refusal, text = _outcome(sys.stdin.buffer.read, filename, limits)
    with os.fdopen(answer_fd, "wb") as answer:
        answer.write("\t".join(refusal).encode() + b"\n")
        answer.write(text.encode())


def _limit(limits: dict[str, int]) -> None:
    for name, most in (
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        resource.setrlimit(name, (most, most))
    # The soft limit tells by its signal what happened; the hard one would look like a kill from outside. It
    # also ends a child whose parent is gone, and who would otherwise compute for ever.
    resource.setrlimit(resource.RLIMIT_CPU, (limits["cpu_s"], limits["cpu_s"] + 5))


def _outcome(read: Callable[[], bytes], filename: str, limits: dict[str, int]) -> tuple[tuple[str, ...], str]:
    try:
        return (), extract(read(), filename, limits)
    except Refused as refusal:
        return (refusal.code, "", str(refusal)), ""
    except MemoryError:
        most = f"{limits['memory_bytes'] >> 20} MiB of memory"
        return ("invalid_file", "MemoryError", f"reading the file needs more than {most}"), ""
    except Exception as error:
        # Libraries raise anything on a damaged file. The type is for the log: a message may repeat the document.
        return ("invalid_file", type(error).__name__, "the file is damaged and cannot be read"), ""


if __name__ == "__main__":
    main()
