"""Models come and go while everything else runs on."""

import asyncio
import copy
import time

import openai
import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]


def hello(model):
    return {"model": model, "messages": [{"role": "user", "content": "hello there"}]}


def actors_of(status, app):
    """Actor ids of an application's replicas: a restarted one has another."""
    deployments = status[app]["deployments"].values()
    return sorted(replica["actor_id"] for deployment in deployments for replica in deployment["replicas"])


async def test_a_model_is_added_and_removed_without_restarting_anything_else(scripted):
    grown = copy.deepcopy(scripted.config)
    second = copy.deepcopy(next(app for app in grown["applications"] if app["name"] == "scripted"))
    second["name"] = second["args"]["model"] = "second"
    second["args"]["engine"]["scripted"] |= {"style": "paraphrase"}
    second["deployments"] = [{"name": "LLMReplica", "num_replicas": 1}]
    grown["applications"].append(second)
    before = scripted.status()
    async with scripted.client() as client:
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(**hello("second"))
        scripted.put(grown)
        scripted.wait_for("second")
        answer = await client.chat.completions.create(**hello("second"))
        assert answer.choices[0].finish_reason == "stop"
        assert "second" in [model.id async for model in client.models.list()]
        assert (await client.chat.completions.create(**hello("scripted"))).model == "scripted"
        after = scripted.status()
        for app in ("scripted", "gateway"):
            assert actors_of(after, app) == actors_of(before, app)

        scripted.put(scripted.config)
        deadline = time.monotonic() + 60
        gone = None
        while gone is None:  # it serves until it is really gone; the gateway's list is a moment older
            assert time.monotonic() < deadline, "the removed model still answers"
            try:
                await client.chat.completions.create(**hello("second"), timeout=20)
            except openai.APIStatusError as error:
                gone = error
        assert gone.status_code in (404, 503)
        with pytest.raises(openai.NotFoundError):
            await _settled(client)


async def _settled(client):
    """The answer for the removed model once a 503 has become a 404."""
    for _ in range(20):
        try:
            await client.chat.completions.create(**hello("second"), timeout=20)
        except openai.InternalServerError:
            await asyncio.sleep(0.5)
