"""`shoal status` and `shoal ask` as a user runs them, against a real cluster on the scripted engine."""

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]


def shoal(system, *words):
    return subprocess.run(
        [sys.executable, "-c", "from app.cli import main; main()", *words, "--url", system.http],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_status_of_a_running_system(scripted):
    scripted.wait_for("scripted")  # another test may have crashed a replica
    result = shoal(scripted, "status", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["ready"]
    assert found["components"]["scripted"] == "ready"
    assert "scripted" in [model["id"] for model in found["models"]]


def test_a_question_is_answered_with_the_time_of_each_stage(scripted):
    result = shoal(scripted, "ask", "Why do fish swim in shoals?")
    assert (result.returncode, result.stdout) == (0, "Why do fish swim in shoals?\n")
    assert "queue " in result.stderr
    assert "decode " in result.stderr
