from __future__ import annotations

import base64
import struct

import numpy as np
import openai
import pytest


async def test_the_official_client_gets_floats_from_base64(client, gateway):
    answer = await client.embeddings.create(model="m", input=["a", "b"])
    assert [item.embedding for item in answer.data] == [[0.5] * 4, [1.5] * 4]
    assert [item.index for item in answer.data] == [0, 1]
    assert (answer.model, answer.usage.prompt_tokens, answer.usage.total_tokens) == ("m", 6, 6)
    assert gateway.embedded == [("a", "b")]


async def test_floats_and_base64_say_the_same(http):
    ask = {"model": "m", "input": "a", "dimensions": 3}
    floats = (await http.post("/v1/embeddings", json=ask)).json()["data"][0]["embedding"]
    packed = (await http.post("/v1/embeddings", json={**ask, "encoding_format": "base64"})).json()
    raw = base64.b64decode(packed["data"][0]["embedding"])
    assert floats == [0.5, 0.5, 0.5] == list(struct.unpack("<3f", raw)) == np.frombuffer(raw, "<f4").tolist()


async def test_token_ids_single_and_several(http, gateway):
    await http.post("/v1/embeddings", json={"model": "m", "input": [1, 2]})
    await http.post("/v1/embeddings", json={"model": "m", "input": [[1], [2, 3]]})
    assert gateway.embedded == [((1, 2),), ((1,), (2, 3))]


async def test_2048_inputs_are_the_most(http, gateway):
    assert (await http.post("/v1/embeddings", json={"model": "m", "input": ["x"] * 2048})).status_code == 200
    answer = await http.post("/v1/embeddings", json={"model": "m", "input": ["x"] * 2049})
    assert answer.status_code == 400
    assert "2048" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": []}, "input"),
        ({"input": 7}, "input"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"dimensions": 0}, "dimensions"),
        ({"truncate": True}, "truncate"),
    ],
)
async def test_bad_embedding_input_is_refused_by_name(client, http, extra, param):
    answer = await http.post("/v1/embeddings", json={"model": "m", "input": "x", **extra})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


async def test_the_official_client_raises_on_an_empty_input(client):
    with pytest.raises(openai.BadRequestError, match="empty string"):
        await client.embeddings.create(model="m", input="")
