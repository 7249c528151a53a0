"""What the actors of a running system wrote into their logs, and when.

Used by `resume`: when a gateway notices that a replica is gone shows nowhere else to the millisecond.
"""

import json
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import psutil

from tests.conftest import System

_OPTION = "--log_dir="  # of its raylet


def folder(system: System) -> Path:
    """Where its processes log."""
    for process in psutil.Process(system.process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            for argument in process.cmdline():
                if argument.startswith(_OPTION):
                    return Path(argument.removeprefix(_OPTION))
    raise LookupError("no process of the system says where it logs")


def times_of(system: System, action: str) -> list[float]:
    """`time.monotonic` of each line with this action, in order."""
    offset_s = time.time() - time.monotonic()
    found = []
    for path in folder(system).glob("worker-*.err"):
        with path.open(errors="replace") as lines:
            found += [at - offset_s for line in lines if (at := _time_of(line, action)) is not None]
    return sorted(found)


def _time_of(line: str, action: str) -> float | None:
    """Unix seconds of a line of our own; None for all others."""
    if action not in line or not line.startswith("{"):
        return None
    with suppress(ValueError, KeyError):
        entry = json.loads(line)
        if entry["action"] == action:
            return datetime.fromisoformat(entry["timestamp"]).timestamp()
    return None
