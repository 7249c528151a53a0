"""`ShoalClient` from a Python process that joined the cluster: a real cluster, the scripted engine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

DRIVER = Path(__file__).with_name("client_driver.py")
ENDLESS_S = 10  # of the answers that the driver leaves


@pytest.fixture(scope="module")
def driver(scripted):
    process = subprocess.Popen(
        [sys.executable, str(DRIVER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "RAY_AUTH_MODE": "token", "RAY_ADDRESS": scripted.address},
    )
    try:
        result = next((line for line in process.stdout if line.startswith("{")), None)
        assert result, "the driver ended without a result"
        yield json.loads(result)
    finally:
        process.communicate(timeout=30)  # closes its stdin, which ends it


async def test_answers_that_nobody_waits_for_stop_in_the_engine(driver, scripted):
    """First in this file: the driver left them a moment ago, and is still alive."""
    assert driver["left"]
    await until(lambda: scripted.metric("shoal_tickets_in_flight") == 0, ENDLESS_S / 2)
    await until(lambda: scripted.metric("shoal_tickets_total", outcome="cancelled") >= 2)
    assert scripted.metric("shoal_requests_total", route="python:generate", status="499") >= 2


def test_answers_are_whole_typed_and_say_where_their_time_went(driver):
    assert driver["texts"][0] == "one two three"
    assert len(driver["texts"]) == 2
    assert driver["usage"] > 6
    assert {"queue", "prefill", "decode"} <= set(driver["stages"])
    assert driver["completion"] == "one two three"
    assert driver["together"] == [f"number {n}" for n in range(32)]
    assert "scripted" in driver["models"]


def test_a_stream_comes_while_the_engine_works(driver):
    stream = driver["stream"]
    assert stream["same"]
    assert stream["pieces"] > 50
    assert stream["first_s"] < stream["last_s"] / 3


def test_errors_arrive_as_ours(driver):
    assert (driver["unknown_model"], driver["late"]) == ("model_not_found", "deadline_exceeded")
    assert driver["no_app"] == "unavailable"


def test_documents_are_embedded_stored_found_and_answered_from(driver):
    documents = driver["documents"]
    assert documents["rows"] == [2, documents["dimensions"]]
    assert documents["same"]
    assert documents["status"] == "completed"
    assert documents["found"] == ["mill.txt"]
    assert documents["filtered"] == []
    assert "four sails" in documents["answer"]
    assert documents["cited"] == ["mill.txt"]
    assert documents["unreadable"] == "invalid_request"
    assert documents["no_store"] == "not_found"
