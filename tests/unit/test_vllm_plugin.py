"""A vLLM process dies with its owner, however that dies."""

import importlib.metadata
import subprocess
import sys
import time

import psutil
import pytest

# An owner whose child does what vLLM's do: starts by spawn, and meets the plugin while it unpickles its task.
OWNER = """
import multiprocessing, time
from actors.engines.vllm_plugin import exit_with_parent

class Task:
    def __setstate__(self, state):
        exit_with_parent()
    def __getstate__(self):
        return {"any": 1}
    def __call__(self):
        print("up", flush=True)
        time.sleep(60)

if __name__ == "__main__":
    exit_with_parent()  # in the owner it does nothing
    child = multiprocessing.get_context("spawn").Process(target=Task())
    child.start()
    child.join()
"""


def test_a_killed_owner_takes_its_engine_processes_with_it(tmp_path) -> None:
    script = tmp_path / "owner.py"
    script.write_text(OWNER)
    owner = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "up\n"
    children = psutil.Process(owner.pid).children(recursive=True)
    assert children
    owner.kill()
    owner.wait()
    owner.stdout.close()
    _, alive = psutil.wait_procs(children, timeout=5)
    for process in alive:
        process.kill()
    assert alive == []


def test_an_owner_that_lives_keeps_them(tmp_path) -> None:
    script = tmp_path / "owner.py"
    script.write_text(OWNER)
    owner = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "up\n"
    time.sleep(0.5)
    assert owner.poll() is None
    assert psutil.Process(owner.pid).children(recursive=True)
    owner.kill()
    owner.wait()
    owner.stdout.close()


@pytest.mark.parametrize("group", ["vllm.platform_plugins", "vllm.general_plugins"])
def test_vllm_finds_the_plugin(group: str) -> None:
    found = importlib.metadata.entry_points(group=group, name="shoal_exit_with_parent")
    assert [entry.value for entry in found] == ["actors.engines.vllm_plugin:exit_with_parent"]
