"""Queue length adds a node and its loss removes one: Ray's fake multi-node provider, GPUs at 0.25 per replica."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(420)]


def test_a_queue_that_grows_adds_a_node_and_an_empty_one_removes_it(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("a namespace needs root: the fake provider's head has fixed ports")
    out = tmp_path / "seen.json"
    namespaces = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    done = subprocess.run(
        [*namespaces, sys.executable, "-m", "tests.serve.fake_nodes", out],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    seen = json.loads(out.read_text())
    assert seen["most_on_a_node"] <= 4  # a fake GPU holds four quarters
    assert seen["failed"] == 0
    assert "replicas_there_s" in seen
    assert seen["nodes_at_end"] == 1
