from __future__ import annotations

import re

import openai
import pytest


async def test_models_are_listed_and_found_by_name_with_a_slash(client):
    listed = await client.models.list()
    assert [model.id for model in listed.data] == ["m", "org/m"]
    assert listed.data[0].model_extra == {"max_model_len": 4096, "type": "generation"}
    assert (await client.models.retrieve("org/m")).id == "org/m"


async def test_an_unknown_model_is_404_with_openais_code(client):
    with pytest.raises(openai.NotFoundError) as caught:
        await client.models.retrieve("nope")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


async def test_models_need_a_key(client):
    with pytest.raises(openai.AuthenticationError):
        await client.with_options(api_key="sk-other").models.list()


async def test_a_key_in_the_query_or_a_cookie_is_no_key(http):
    answer = await http.get(
        "/v1/models?api_key=sk-test-secret",
        headers={"authorization": "", "cookie": "authorization=sk-test-secret"},
    )
    assert answer.status_code == 401


async def test_health_answers_without_a_key(http):
    answer = await http.get("/healthz", headers={"authorization": ""})
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


async def test_readiness_names_what_is_missing(http, gateway):
    good = await http.get("/readyz", headers={"authorization": ""})
    assert (good.status_code, good.json()) == (200, {"status": "ready", "components": {"m": "ready"}})
    gateway.parts = {"m": "ready", "retrieval": "starting"}
    bad = await http.get("/readyz")
    assert bad.status_code == 503
    assert bad.headers["retry-after"] == "1"
    assert bad.json()["error"]["message"] == "not ready: retrieval: starting"


@pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/redoc"])
async def test_the_description_is_off_by_default(http, path):
    assert (await http.get(path)).status_code == 404


async def test_the_description_can_be_exposed(http, gateway):
    gateway.config.expose_docs = True
    description = await http.get("/openapi.json")
    assert "/v1/chat/completions" in description.json()["paths"]
    referred = set(re.findall(r'"\$ref":"#/components/schemas/(\w+)"', description.text))
    assert {"ChatMessage", "ToolSpec"} <= referred <= set(description.json()["components"]["schemas"])
    assert "swagger" in (await http.get("/docs")).text
