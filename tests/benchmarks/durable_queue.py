"""The job log beside arq and Celery on the same Valkey: enqueue, lease and finish at 500 jobs a second.

    python -m tests.benchmarks.durable_queue [--quick] [--json FILE] [--rate JOBS_PER_S]

Each queue has one producer and one worker process with 16 places, and jobs that do nothing; one queue runs at a time.
Latency is from before a job is enqueued until it is finished and acknowledged (Celery: until its task has ended). The
server appends every write to its file before it answers (appendonly, everysec) for all of them. arq keeps a result for
every job, and polls every 10 ms; Celery acknowledges late and keeps no results. Shoal's jobs are leased with a
heartbeat and fenced by an epoch.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from actors.local_services import ValkeyServer, ValkeyServerConfig
from actors.stores.config import StorageConfig
from tests.benchmarks.environments import NotInstalled, environment
from tests.benchmarks.report import Row, parser, publish
from tests.conftest import ROOT

RATE = 500
SECONDS, QUICK_SECONDS = 30, 6
SIDES = Path(__file__).with_name("durable_queue_sides.py")
PEERS = {"arq": ["arq==0.26.3"], "celery": ["celery==5.5.3", "redis==5.2.1"]}
_LATE_S = 20  # a queue that does not keep up is given up


def measured(queue: str, python: str, socket: Path, rate: float, count: int) -> list[float]:
    """Seconds that each job took, sorted."""
    command = [python, "-P", str(SIDES), queue]  # -P: a module beside it is named like one of Python's own
    rest = [str(socket), str(rate), str(count)]
    env = {**os.environ, "PYTHONPATH": str(ROOT) if queue == "shoal" else ""}
    with subprocess.Popen(
        [*command, "work", *rest], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
    ) as worker:
        patience = threading.Timer(count / rate + _LATE_S, worker.kill)
        patience.start()
        try:
            while "ready" not in (line := worker.stdout.readline()):
                if not line:
                    raise NotInstalled(f"the worker of {queue} ended, or did not keep up")
            subprocess.run([*command, "produce", *rest], check=True, env=env, timeout=count / rate + _LATE_S)
            while not (line := worker.stdout.readline()).startswith("["):
                if not line:
                    raise NotInstalled(f"the worker of {queue} ended, or did not keep up")
        finally:
            patience.cancel()
            worker.kill()
    return sorted(json.loads(line))


def rows_of(found: dict[str, list[float]], rate: float) -> list[Row]:
    """p50 and p99 of Shoal beside each peer."""
    rows = []
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        values = {queue: seconds[int(len(seconds) * share)] * 1e3 for queue, seconds in found.items()}
        shoal = values.pop("shoal")
        rows.append(Row(name=f"shoal_{name}_ms_at_{rate:g}", value=shoal, unit="ms"))
        rows += [
            Row(name=f"{name} beside {queue}", value=shoal, unit="ms", baseline=queue, baseline_value=value)
            for queue, value in values.items()
        ]
    return rows


def main() -> None:
    options = parser("the job log beside arq and Celery")
    options.add_argument("--rate", type=float, default=RATE, help="jobs per second")
    chosen = options.parse_args()
    count = round(chosen.rate * (QUICK_SECONDS if chosen.quick else SECONDS))
    pythons = {"shoal": sys.executable}
    for peer, packages in PEERS.items():
        try:
            pythons[peer] = str(environment(f"durable-{peer}", packages) / "python")
        except NotInstalled as error:
            print(f"{peer} is left out: {error}")
    folder = Path(tempfile.mkdtemp(prefix="shoal-"))  # short: a socket's path has 107 bytes
    storage = StorageConfig(data_dir=folder)
    server = ValkeyServer(ValkeyServerConfig(storage=storage))
    found: dict[str, list[float]] = {}
    try:
        for queue, python in pythons.items():
            try:
                found[queue] = measured(queue, python, storage.valkey_socket, chosen.rate, count)
            except (NotInstalled, subprocess.SubprocessError) as error:
                print(f"{queue} is left out: {error}")
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)
    if "shoal" not in found:
        sys.exit("nothing to compare with")
    publish(f"durable queue, {chosen.rate:g} jobs/s, {count} jobs", rows_of(found, chosen.rate), chosen.json)


if __name__ == "__main__":
    main()
