"""Virtual environments for peers whose packages exclude ours; made once, kept in the user's cache.

Called by `peers`. An environment is made again when its requirements change.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


class NotInstalled(Exception):
    """A peer could not be installed; the message says why."""


def environment(name: str, *installs: Sequence[str]) -> Path:
    """The folder of an environment's programs.

    Args:
        name: of the folder.
        installs: arguments of `pip install`, one call each, in this order.

    Raises:
        NotInstalled: pip failed.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "shoal-benchmarks"
    folder, wanted = cache / name, "\n".join(" ".join(arguments) for arguments in installs)
    done = folder / "done"
    if not done.exists() or done.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        print(f"installing {name} into {folder} (once)", flush=True)
        _run([sys.executable, "-m", "venv", str(folder)])
        for arguments in installs:
            _run([str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *arguments])
        done.write_text(wanted)
    return folder / "bin"


def _run(command: list[str]) -> None:
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise NotInstalled(ended.stderr.strip().rpartition("\n")[2] or f"{command[0]}: {ended.returncode}")
