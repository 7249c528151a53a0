"""One measurement: a load process against a server, and what the server's processes spent meanwhile.

Called by `gateway` and `token_path`. Processor time is read when the load process says that counting begins and
ends; what the same processes draw with nothing to do was measured before and is known to the caller.
"""

import json
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import urlsplit

from tests.benchmarks.load import Spec
from tests.benchmarks.processes import cpu_by_role
from tests.benchmarks.saturation import HAPROXY
from tests.conftest import ROOT, free_port


@dataclass(frozen=True, kw_only=True)
class Target:
    """A server under test."""

    url: str
    model: str  # what requests call it
    pids: tuple[int, ...]  # roots of the process trees that count
    names: tuple[str, ...] = ()  # of these trees; without, their processes are told apart by what they are
    headers: dict[str, str] = field(default_factory=dict)
    path: str = "/v1/chat/completions"

    def spec(self, body: dict[str, Any], **load: Any) -> Spec:
        """A load on it."""
        at = urlsplit(self.url)
        body = {"model": self.model, **body}
        return Spec(host=at.hostname, port=at.port, path=self.path, headers=self.headers, body=body, **load)

    def cpu(self) -> Counter[str]:
        """Processor seconds so far, by role."""
        trees = [cpu_by_role(pid) for pid in self.pids]
        if self.names:
            return Counter({name: tree.total() for name, tree in zip(self.names, trees, strict=True)})
        return sum(trees, Counter())

    def idle(self, seconds: float) -> Counter[str]:
        """Processor seconds per second with nothing to do, by role."""
        before, started = self.cpu(), time.perf_counter()
        time.sleep(seconds)
        return _scaled(self.cpu() - before, 1 / (time.perf_counter() - started))


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What one load found."""

    count: int  # requests or tokens, while counting
    wall_s: float
    cpu_s: Counter[str]  # by role, idle draw included
    result: dict[str, Any]  # of the load process

    @property
    def per_s(self) -> float:
        """Requests or tokens per second."""
        return self.count / self.wall_s

    def cpu_each(self, idle: Counter[str] | None = None) -> Counter[str]:
        """Processor seconds per request or token, by role.

        Args:
            idle: draw per second to be left out.
        """
        spent = Counter(self.cpu_s)
        spent.subtract(_scaled(idle or Counter(), self.wall_s))
        return _scaled(spent, 1 / self.count)


class LoadFailed(Exception):
    """The load process ended with an error: the server refused, broke off or did not keep the pace."""


def drive(target: Target, spec: Spec) -> Sample:
    """Put one load on a server.

    Raises:
        LoadFailed: it did not get its answers.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.load"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(asdict(spec)) + "\n")
        process.stdin.flush()
        begin, before = _next(process), target.cpu()
        process.stdin.write("go\n")
        process.stdin.flush()
        end, after = _next(process), target.cpu()
        result = _next(process)
    finally:
        process.kill()
        process.communicate()
    after.subtract(before)
    count, wall_s = end["count"] - begin["count"], end["at_s"] - begin["at_s"]
    return Sample(count=count, wall_s=wall_s, cpu_s=after, result=result)


def haproxy_mode() -> dict[str, str]:
    """Environment of a system in HAProxy mode; HAProxy's own ports are fixed unless said otherwise, and collide."""
    ports = ("RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_STATS_PORT")
    return {**HAPROXY, **{name: str(free_port()) for name in ports}}


def mean(one: Counter[str], other: Counter[str]) -> Counter[str]:
    """Of the idle draw before and after a load: a system that has just started still settles."""
    return _scaled(one + other, 0.5)


def _next(process: subprocess.Popen) -> dict[str, Any]:
    line = process.stdout.readline()
    if not line:
        raise LoadFailed(process.stderr.read().strip().rpartition("\n")[2] or "the load process ended")
    return json.loads(line)


def _scaled(counter: Counter[str], by: float) -> Counter[str]:
    return Counter({role: value * by for role, value in counter.items()})
