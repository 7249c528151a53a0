"""The local Valkey and Chroma as real child processes: how they start, come back, end, and keep their data."""

import asyncio
import gc
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path

import chromadb
import httpx
import pytest
from chromadb.config import Settings
from redis import Redis

from actors.local_services import ChromaServer, ChromaServerConfig, ValkeyServer, ValkeyServerConfig
from actors.stores.config import StorageConfig
from actors.supervised_child import ChildFailed, ChildSpec, SupervisedChild

pytestmark = pytest.mark.local

OWNER = """
import json, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background of a shell ignores it
from actors.local_services import ChromaServer, ChromaServerConfig, ValkeyServer, ValkeyServerConfig
from actors.stores.config import StorageConfig
storage = StorageConfig(data_dir=sys.argv[1], chroma_port=int(sys.argv[2]))
valkey = ValkeyServer(ValkeyServerConfig(storage=storage))
chroma = ChromaServer(ChromaServerConfig(storage=storage))
print(json.dumps([valkey._child.pid, chroma._child.pid]), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def folder():
    path = Path(tempfile.mkdtemp(prefix="shoal-"))  # short: a socket's path has 107 bytes
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def storage(folder):
    return StorageConfig(data_dir=folder, chroma_port=free_port())


@pytest.fixture
def valkey(storage):
    server = ValkeyServer(ValkeyServerConfig(storage=storage))
    yield server
    server.stop()


@pytest.fixture
def owner(storage):
    """A process of its own that owns both servers; it ends when its standard input does."""
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(storage.root), str(storage.chroma_port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        yield process
        process.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def redis_of(storage) -> Redis:
    return Redis(unix_socket_path=str(storage.valkey_socket), protocol=2)


def collection_of(storage):
    client = chromadb.HttpClient(
        host="127.0.0.1", port=storage.chroma_port, settings=Settings(anonymized_telemetry=False)
    )
    return client.get_or_create_collection("vectors", embedding_function=None)


def is_alive(pid) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, timeout_s=10.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


# --- Valkey --------------------------------------------------------------------------------------------


async def test_valkey_listens_on_a_socket_that_only_its_owner_can_open(valkey, storage):
    await valkey.check_health()
    assert stat.S_IMODE(storage.valkey_socket.stat().st_mode) == 0o600
    assert stat.S_IMODE(storage.valkey_socket.parent.stat().st_mode) == 0o700
    inodes = {str(f.readlink()) for f in Path(f"/proc/{valkey._child.pid}/fd").iterdir()}
    tcp = [line.split()[9] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    assert not inodes & {f"socket:[{inode}]" for inode in tcp}, "no TCP port is open"


def test_valkey_keeps_what_it_may_not_lose_and_evicts_nothing(folder):
    storage = StorageConfig(data_dir=folder)
    config = ValkeyServerConfig(storage=storage, durability="always", max_memory_bytes=64 * 2**20)
    server = ValkeyServer(config)
    with redis_of(storage) as redis:
        settings = redis.config_get("append*", "max*")
    assert settings["appendonly"] == "yes"
    assert settings["appendfsync"] == "always"
    assert settings["maxmemory"] == str(64 * 2**20)
    assert settings["maxmemory-policy"] == "noeviction"
    server.stop()


def test_a_killed_valkey_comes_back_with_every_acknowledged_write(valkey, storage):
    for _ in range(2):
        pid = valkey._child.pid
        with redis_of(storage) as redis:
            written = redis.incrby("n", 1)
            redis.pipeline().rpush("list", *range(1000)).execute()
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda pid=pid: valkey._child.pid not in {None, pid})
        wait_for(lambda: asyncio.run(healthy(valkey)))
        with redis_of(storage) as redis:
            wait_for(redis.ping)
            assert redis.get("n") == str(written).encode()
            assert redis.llen("list") == 1000 * written


async def healthy(server) -> bool:
    try:
        await server.check_health()
    except ChildFailed:
        return False
    return True


async def test_a_valkey_that_hangs_is_unhealthy(valkey):
    os.kill(valkey._child.pid, signal.SIGSTOP)
    try:
        await valkey.check_health()  # as young as it is, it may still be loading
        valkey._child._started_s -= 100
        with pytest.raises(ChildFailed, match="valkey does not answer: TimeoutError"):
            await valkey.check_health()
    finally:
        os.kill(valkey._child.pid, signal.SIGCONT)
    await valkey.check_health()


async def test_a_stopped_server_is_unhealthy_and_stopping_again_is_no_error(valkey):
    valkey.stop()
    valkey.stop()
    with pytest.raises(ChildFailed, match="valkey is not running"):
        await valkey.check_health()


def test_a_data_folder_with_too_long_a_path_is_refused_by_its_setting(folder):
    storage = StorageConfig(data_dir=folder / ("x" * 100))
    with pytest.raises(ChildFailed, match=r"107: set storage\.data_dir to a shorter path"):
        ValkeyServer(ValkeyServerConfig(storage=storage))


# --- Chroma --------------------------------------------------------------------------------------------


async def test_chroma_starts_answers_and_finds_its_data_again(storage):
    vectors = [[float(i == j) for j in range(8)] for i in range(8)]
    for start in range(2):
        server = ChromaServer(ChromaServerConfig(storage=storage))
        await server.check_health()
        collection = collection_of(storage)
        if start == 0:
            collection.upsert(ids=[str(i) for i in range(8)], embeddings=vectors)
        assert collection.query(query_embeddings=[vectors[3]], n_results=1)["ids"] == [["3"]]
        server.stop()
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{storage.effective_chroma_url}/api/v2/heartbeat")


async def test_chroma_is_the_server_itself_on_loopback_only(storage):
    server = ChromaServer(ChromaServerConfig(storage=storage))
    listening = [
        line.split()[1]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if line.split()[1].endswith(f":{storage.chroma_port:04X}") and line.split()[3] == "0A"
    ]
    assert listening == [f"0100007F:{storage.chroma_port:04X}"]
    assert not Path(f"/proc/{server._child.pid}/task/{server._child.pid}/children").read_text()
    server.stop()


def test_a_port_that_is_taken_is_refused_with_its_number_and_setting(storage):
    with socket.socket() as other:
        other.bind(("127.0.0.1", storage.chroma_port))
        other.listen()
        with pytest.raises(ChildFailed, match=rf"port {storage.chroma_port} .*set storage\.chroma_port"):
            ChromaServer(ChromaServerConfig(storage=storage))


# --- the end of the owner ------------------------------------------------------------------------------


END = {
    "kill -9": lambda owner: owner.kill(),
    "Ctrl-C": lambda owner: os.killpg(owner.pid, signal.SIGINT),
    "SIGTERM": lambda owner: owner.terminate(),
    "exit": lambda owner: owner.stdin.close(),
}


@pytest.mark.chaos
@pytest.mark.parametrize("how", END)
def test_no_server_outlives_its_owner_and_the_next_owner_finds_the_data(storage, owner, how):
    children = json.loads(next(line for line in owner.stdout if line.startswith("[")))
    with redis_of(storage) as redis:
        redis.set("kept", how)
    collection_of(storage).upsert(ids=["kept"], embeddings=[[1.0, 0.0]])
    END[how](owner)
    owner.wait(15)
    wait_for(lambda: not any(is_alive(pid) for pid in children), 5)
    assert "bye bye" in (storage.root / "logs" / "valkey.log").read_text(), "it ended by itself"

    valkey = ValkeyServer(ValkeyServerConfig(storage=storage))
    chroma = ChromaServer(ChromaServerConfig(storage=storage))
    with redis_of(storage) as redis:
        assert redis.get("kept") == how.encode()
    assert collection_of(storage).query(query_embeddings=[[1.0, 0.0]], n_results=1)["ids"] == [["kept"]]
    valkey.stop()
    chroma.stop()


def test_an_object_that_is_dropped_takes_its_server_with_it(storage):
    server = ValkeyServer(ValkeyServerConfig(storage=storage))
    pid = server._child.pid
    del server
    gc.collect()
    assert not is_alive(pid)


# --- the supervised child ------------------------------------------------------------------------------

SLOW_TO_END = """
import signal, sys, time
def end(*_):
    time.sleep(1.0)
    open(sys.argv[1], "w").write(str(time.time()))
    sys.exit()
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(60)
"""


def child_of(folder, code, *arguments, **settings):
    log_file = folder / "log"
    spec = ChildSpec(
        name="tester",
        command=[sys.executable, "-u", "-c", code, *map(str, arguments)],
        folder=folder / "data",
        log_file=log_file,
        **{"start_timeout_s": 5.0, **settings},
    )

    def probe() -> None:
        if "ready" not in log_file.read_text():
            raise OSError

    return SupervisedChild(spec, probe)


def test_a_child_outlives_the_thread_that_asked_for_it(folder):
    child = child_of(folder, SLOW_TO_END, folder / "ended")
    thread = threading.Thread(target=child.start)
    thread.start()
    thread.join()
    time.sleep(0.3)
    child.require_running()
    child.stop()
    assert child.pid is None


def test_a_new_owner_waits_until_the_old_child_has_ended(folder):
    code = (
        "import sys, time\nfrom tests_owner import child_of, SLOW_TO_END, Path\n"
        "child = child_of(Path(sys.argv[1]), SLOW_TO_END, sys.argv[1] + '/ended')\n"
        "child.start()\nprint('OWNER READY', flush=True)\ntime.sleep(60)\n"
    )
    modules = folder / "modules"
    modules.mkdir()
    shutil.copy(__file__, modules / "tests_owner.py")
    owner = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(modules)},
    )
    while "OWNER READY" not in owner.stdout.readline():
        pass
    owner.kill()
    owner.wait()
    owner.stdout.close()
    child = child_of(folder, SLOW_TO_END, folder / "ended2")
    child.start()
    assert float((folder / "ended").read_text()) <= child_started_at(child)
    child.stop()


def child_started_at(child) -> float:
    ticks = int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19])
    uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - uptime_s + ticks / os.sysconf("SC_CLK_TCK") + 0.05  # the tick's rounding


def test_a_folder_that_is_in_use_is_refused_with_its_owner(folder):
    first = child_of(folder, SLOW_TO_END, folder / "ended")
    first.start()
    with pytest.raises(ChildFailed, match=rf"in use by another tester, started by process {os.getpid()}"):
        child_of(folder, SLOW_TO_END, folder / "ended", lock_timeout_s=0.1).start()
    first.stop()


def test_a_child_that_cannot_start_says_why(folder):
    with pytest.raises(ChildFailed, match=r"ended while it started: .*no such option"):
        child_of(folder, "raise SystemExit('no such option')").start()


def test_a_child_that_never_answers_is_given_up(folder):
    with pytest.raises(ChildFailed, match=r"did not answer within 0\.5 s"):
        child_of(folder, "import time; time.sleep(60)", start_timeout_s=0.5).start()


def test_a_child_that_ends_over_and_over_is_restarted_ever_more_slowly_and_is_unhealthy(folder):
    code = "import time\nprint('ready', time.monotonic(), flush=True)\ntime.sleep(0.05)\n"
    child = child_of(folder, code)
    child.start()
    wait_for(lambda: (folder / "log").read_text().count("ready") >= 4)
    assert not child.is_starting
    child.stop()
    starts = [float(line.split()[1]) for line in (folder / "log").read_text().splitlines()]
    pauses = [later - earlier for earlier, later in pairwise(starts)]
    assert pauses[1] > pauses[0] + 0.05
    assert pauses[2] > pauses[1] + 0.1


def test_a_child_that_ignores_sigterm_is_killed_after_its_grace(folder):
    code = "import signal, time\nsignal.signal(15, signal.SIG_IGN)\nprint('ready')\ntime.sleep(60)\n"
    child = child_of(folder, code, stop_grace_s=0.3)
    child.start()
    pid = child.pid
    started = time.monotonic()
    child.stop()
    assert 0.25 < time.monotonic() - started < 3
    assert not is_alive(pid)


def test_a_child_sees_none_of_our_settings(folder, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "canary")
    child = child_of(folder, "import os, time\nprint('ready', dict(os.environ))\ntime.sleep(60)\n")
    child.start()
    assert "canary" not in (folder / "log").read_text()
    child.stop()


def test_a_large_log_is_put_aside_when_the_child_starts(folder):
    (folder / "log").write_text("x" * (10 * 2**20 + 1))
    child = child_of(folder, "import time\nprint('ready')\ntime.sleep(60)\n")
    child.start()
    child.stop()
    assert (folder / "log.1").stat().st_size > 10 * 2**20
    assert (folder / "log").stat().st_size < 1000
