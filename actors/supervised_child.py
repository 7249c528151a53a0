"""One server process, kept running, that never outlives its owner and never shares its folder.

Used by `actors.local_services` alone, which knows what the server is and how to ask whether it answers.

How the child ends, whatever happens to the owner (Linux):

- A small launcher asks the kernel for SIGTERM at the owner's death (PR_SET_PDEATHSIG), then becomes the
  server. The kernel means the *thread* that started the child: one thread here starts it and stays with it.
- A session of its own keeps Ctrl-C, and whoever signals the owner's process group, from ending it half-way.
- The folder's lock is an flock on a descriptor that the child inherits: it is held until owner *and* child
  are gone, so a new owner waits for the old child's last write.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from actors.telemetry import logger

_LAUNCHER = """
import ctypes, os, signal, sys
signal.pthread_sigmask(signal.SIG_SETMASK, ())
ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))
if os.getppid() != int(sys.argv[1]):
    sys.exit("the owner is gone already")
os.execv(sys.argv[2], sys.argv[2:])
"""
# What a server may need; our own settings and tokens are none of its business.
_ENVIRONMENT = ("PATH", "PYTHONPATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH")

_POLL_S = 0.02
_LONG_RUN_S = 30.0  # a run this long ends a row of failures
_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 0.1, 5.0
_LOG_BYTES = 10 * 2**20
_LOG_TAIL_BYTES = 500

_log = logger("supervised_child")


class ChildFailed(RuntimeError):
    """The server did not start, or is not running."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChildSpec:
    """What to run, and where."""

    name: str
    command: Sequence[str]  # an absolute path and its arguments
    folder: Path  # its data, and the lock; made with mode 0700
    log_file: Path  # stdout and stderr; a large one is put aside when the child starts
    environment: tuple[tuple[str, str], ...] = ()
    start_timeout_s: float = 30.0  # until it first answers
    lock_timeout_s: float = 30.0  # for an earlier owner's child to end
    stop_grace_s: float = 10.0  # between SIGTERM and SIGKILL


class SupervisedChild:
    """Starts the server, restarts it with back-off when it ends, and stops it.

    Args:
        spec: the server.
        probe: asks the server once and raises unless it answers.
        check: raises ChildFailed where it cannot start (a port is taken); called before every start.
    """

    def __init__(
        self, spec: ChildSpec, probe: Callable[[], None], check: Callable[[], None] = lambda: None
    ) -> None:
        self._spec = spec
        self._probe = probe
        self._check = check
        self._guard = threading.Lock()  # over _process and the decision to start another one
        self._process: subprocess.Popen[bytes] | None = None
        self._started_s = 0.0
        self._failures = 0  # short runs in a row
        self._stopping = threading.Event()
        self._refusal: ChildFailed | None = None
        self._thread: threading.Thread | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the running child."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    @property
    def is_starting(self) -> bool:
        """Whether it runs, is too young to be blamed for silence, and is not failing over and over."""
        young = time.monotonic() - self._started_s < self._spec.start_timeout_s
        return self.pid is not None and young and self._failures <= 1

    def start(self) -> None:
        """Start, and return once it answers. Blocks; not for an event loop that serves others.

        Raises:
            ChildFailed: another owner holds the folder, or the child ended or stayed silent.
        """
        lock = self._lock_folder()
        self._thread = threading.Thread(
            target=self._supervise, args=(lock,), name=f"supervise-{self._spec.name}", daemon=True
        )
        self._thread.start()
        atexit.register(self.stop)  # before the interpreter freezes its threads
        try:
            self._await_answer()
        except ChildFailed:
            self.stop()
            raise

    def require_running(self) -> None:
        """Raise ChildFailed while there is no child (it is about to be restarted, or stopped)."""
        if self.pid is None:
            raise ChildFailed(f"{self._spec.name} is not running; see {self._spec.log_file}")

    def stop(self) -> None:
        """End the child: SIGTERM, and SIGKILL after the grace. Again, or before `start`, is no error."""
        with self._guard:
            self._stopping.set()
            process = self._process
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(self._spec.stop_grace_s)
            except subprocess.TimeoutExpired:
                _log.error("child_killed", name=self._spec.name, grace_s=self._spec.stop_grace_s)
                process.kill()
        if self._thread is not None:
            self._thread.join(self._spec.stop_grace_s)
        atexit.unregister(self.stop)

    def _await_answer(self) -> None:
        deadline = time.monotonic() + self._spec.start_timeout_s
        while time.monotonic() < deadline:
            if self._refusal is not None:
                raise self._refusal
            if self._failures:
                raise ChildFailed(f"{self._spec.name} ended while it started: {self._log_tail()}")
            if self.pid is not None:  # before that, another program might answer
                with suppress(Exception):  # whatever is wrong, it does not answer yet
                    self._probe()
                    return
            time.sleep(_POLL_S)
        raise ChildFailed(f"{self._spec.name} did not answer within {self._spec.start_timeout_s:g} s")

    # --- the thread that owns the child ---------------------------------------------------------------

    def _supervise(self, lock: int) -> None:
        try:
            while not self._stopping.is_set():
                self._run_once(lock)
                if not self._stopping.is_set():
                    backoff_s = min(_FIRST_BACKOFF_S * 2 ** (self._failures - 1), _LONGEST_BACKOFF_S)
                    self._stopping.wait(backoff_s)
        finally:
            os.close(lock)

    def _run_once(self, lock: int) -> None:
        try:
            self._check()
            with self._guard:
                if self._stopping.is_set():
                    return
                self._process = process = self._spawn(lock)
                self._started_s = time.monotonic()
        except (ChildFailed, OSError) as error:
            self._failures += 1
            self._refusal = error if isinstance(error, ChildFailed) else ChildFailed(str(error))
            _log.error("child_not_started", name=self._spec.name, error=str(error))
            return
        self._refusal = None
        code = process.wait()
        ran_s = time.monotonic() - self._started_s
        self._failures = 1 if ran_s > _LONG_RUN_S else self._failures + 1
        if not self._stopping.is_set():
            _log.error("child_ended", name=self._spec.name, code=code, ran_s=round(ran_s, 3))

    def _spawn(self, lock: int) -> subprocess.Popen[bytes]:
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        with self._open_log() as output:
            process = subprocess.Popen(  # noqa: S603  a fixed command, no shell
                [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *self._spec.command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self._spec.folder,
                env=environment | dict(self._spec.environment),
                pass_fds=(lock,),
                start_new_session=True,
            )
        _log.info("child_started", name=self._spec.name, pid=process.pid)
        return process

    # --- files ----------------------------------------------------------------------------------------

    def _lock_folder(self) -> int:
        folder = self._spec.folder
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        lock = os.open(folder / "owner.lock", os.O_RDWR | os.O_CREAT, 0o600)
        deadline = time.monotonic() + self._spec.lock_timeout_s
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(_POLL_S)
                    continue
                owner = os.pread(lock, 32, 0).decode(errors="replace").strip()
                os.close(lock)
                raise ChildFailed(
                    f"{folder} is in use by another {self._spec.name}, started by process {owner or '?'}: "
                    "stop it, or set storage.data_dir to another folder"
                ) from None
            os.ftruncate(lock, 0)
            os.pwrite(lock, str(os.getpid()).encode(), 0)
            return lock

    def _open_log(self) -> BinaryIO:
        log_file = self._spec.log_file
        log_file.parent.mkdir(parents=True, exist_ok=True)
        if log_file.exists() and log_file.stat().st_size > _LOG_BYTES:
            log_file.replace(log_file.with_suffix(f"{log_file.suffix}.1"))
        return log_file.open("ab")

    def _log_tail(self) -> str:
        return self._spec.log_file.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace").strip()
