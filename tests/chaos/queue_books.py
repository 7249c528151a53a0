"""Prints the conservation sum of a model's queue as JSON, a line for each line it reads.

    python -m tests.chaos.queue_books ADDRESS MODEL

Runs beside a test system, since tests attach no driver. `Books` is its other end.
"""

import json
import os
import subprocess
import sys
from typing import Self

import ray
from ray import serve

from tests.conftest import ROOT, System


class Books:
    """The sum as the queue has it now; a context."""

    def __init__(self, system: System, model: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.queue_books", system.address, model],
            cwd=ROOT,
            env={**os.environ, "RAY_AUTH_MODE": "token"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def read(self) -> dict[str, int]:
        """accepted, in_flight and every outcome."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise AssertionError("the process that reads the books has ended")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


def main() -> None:
    address, model = sys.argv[1:]
    ray.init(address=address, log_to_driver=False, logging_level="error")
    queue = serve.get_deployment_handle("BatchingQueue", model)
    for _ in sys.stdin:
        print(json.dumps(queue.conservation.remote().result(timeout_s=30)), flush=True)


if __name__ == "__main__":
    main()
