"""Ends an engine's child processes when the process that owns them is gone, however it died.

vLLM notices the death of a child but not of a parent: after `kill -9` of the owner its EngineCore would sit on
the memory for ever. vLLM itself calls this in every process it starts, through entry points (pyproject.toml) in
the group `vllm.platform_plugins`, which it loads while it is imported, and in `vllm.general_plugins`, for when
VLLM_TARGET_DEVICE makes it skip the first. Nobody else does.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from functools import cache
from multiprocessing.connection import wait


@cache  # both groups call it: one watch is enough
def exit_with_parent() -> None:
    """Kill this process once its parent is gone; does nothing in a process that multiprocessing did not start.

    The parent's sentinel (a pipe that its death closes) is watched, not PR_SET_PDEATHSIG: that fires when the
    *thread* that started the child ends, and an engine may be started from any thread.

    Returns:
        None, which tells vLLM that this is no platform.
    """
    spawned = "--multiprocessing-fork" in sys.orig_argv
    if spawned or multiprocessing.parent_process() is not None:
        threading.Thread(target=_watch, name="exit-with-parent", daemon=True).start()


def _watch() -> None:
    # A spawned child imports vLLM while it unpickles its task, before multiprocessing knows the parent.
    while (parent := multiprocessing.parent_process()) is None:
        time.sleep(0.1)
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)
