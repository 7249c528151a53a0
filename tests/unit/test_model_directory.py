"""Which models a gateway knows, and what a slow or absent controller costs it: nothing."""

import asyncio
import threading

import pytest

from actors.errors import ModelNotFound, Unavailable
from actors.handles import models
from actors.handles.models import Application, ModelDirectory
from actors.types import Principal, Ticket


def model(name):
    return Application(name=name, deployed_at=0, status="RUNNING", is_model=True)


@pytest.fixture
def controller(monkeypatch):
    """What the controller answers; `held` keeps it from answering."""

    class Controller:
        def __init__(self):
            self.applications = [model("m")]
            self.held = threading.Event()

    found = Controller()
    found.held.set()

    def answer():
        found.held.wait(5)
        return found.applications

    monkeypatch.setattr(models, "_applications", answer)
    yield found
    found.held.set()


@pytest.fixture
async def directory():
    directory = ModelDirectory("g")
    yield directory
    await directory.close()


async def test_a_known_model_is_found_at_once_while_the_controller_does_not_answer(
    directory, controller, monkeypatch
):
    known = await directory.find("m")
    monkeypatch.setattr(models, "_REFRESH_S", 0.0)
    controller.held.clear()
    async with asyncio.timeout(0.5):
        for _ in range(3):
            assert await directory.find("m") is known


async def test_a_controller_that_does_not_answer_is_not_waited_for_longer_than_its_time(
    directory, controller, monkeypatch
):
    monkeypatch.setattr(models, "_REFRESH_TIMEOUT_S", 0.05)
    controller.held.clear()
    async with asyncio.timeout(1):
        with pytest.raises(ModelNotFound):
            await directory.find("new")


async def test_a_removed_model_is_unknown_and_who_holds_its_client_is_told(
    directory, controller, monkeypatch
):
    monkeypatch.setattr(models, "_REFRESH_ON_MISS_S", 0.0)
    client = await directory.find("m")
    controller.applications = [model("other")]
    await directory.models()
    with pytest.raises(ModelNotFound, match="other"):
        await directory.find("m")
    late = Ticket(
        request_id="r",
        principal=Principal(tenant="t"),
        prompt_tokens=1,
        predicted_output_tokens=1,
        timeout_s=9,
    )
    with pytest.raises(Unavailable):
        await client._queue.acquire(late)


def rebuilding(name):
    return Application(name=name, deployed_at=1, status="DEPLOYING", is_model=False, rebuilding=True)


async def test_a_model_whose_arguments_are_being_changed_keeps_its_client(directory, controller, monkeypatch):
    known = await directory.find("m")
    controller.applications = [rebuilding("m")]
    monkeypatch.setattr(models, "_REFRESH_ON_MISS_S", 0.0)
    await directory.models()
    assert await directory.find("m") is known
    controller.applications = []
    await directory.models()
    with pytest.raises(ModelNotFound):
        await directory.find("m")


async def test_a_model_that_is_being_deployed_for_the_first_time_is_not_there_yet_but_it_exists(
    directory, controller
):
    controller.applications = [rebuilding("new")]
    with pytest.raises(Unavailable) as soon:
        await directory.find("new")
    assert soon.value.retry_after_s == 1.0
