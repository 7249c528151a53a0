"""The rendered manifests as running processes, each fault once (`tests.kuberay.report --quick`)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.cluster, pytest.mark.chaos, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one quick run says."""
    tools = [tool for tool in ("unshare", "nsenter", "setpriv", "ip") if shutil.which(tool) is None]
    if os.geteuid() != 0 or tools:
        pytest.skip(f"namespaces need root and {', '.join(tools) or 'nothing else'}")
    out = tmp_path_factory.mktemp("faithful") / "report.json"
    command = [sys.executable, "-m", "tests.kuberay.report", "--quick", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stderr[-8000:]
    return json.loads(out.read_text())["scenes"]


def test_the_manifests_come_to_a_system_that_serves(report):
    assert report["start"]["endpoints_at_switch"] == 2


def test_a_changed_serve_config_fails_nobody(report):
    assert report["config_update"]["failed"] == 0, report["config_update"]["examples"]


def test_a_killed_worker_costs_only_what_went_through_it(report):
    scene = report["worker_killed"]
    assert scene["never"] == 0, scene["examples"]
    assert scene["failed_later"] == 0, scene["examples"]


def test_a_killed_head_fails_nobody_and_remembers_everything(report):
    scene = report["head_killed"]
    assert scene["failed"] == 0, scene["examples"]
    assert scene["replaced"] == []


def test_an_upgrade_fails_nobody_and_has_no_moment_without_an_endpoint(report):
    scene = report["upgrade"]
    assert scene["failed"] == 0, scene["examples"]
    assert scene["endpoints_at_switch"] == 2
    assert scene["without_endpoint_s"] == 0
