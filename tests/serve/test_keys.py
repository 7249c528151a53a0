"""Keys and limits as an operator sets them and as a client meets them: auth.mode keys, with the official client."""

import json
import re
import subprocess
import sys
import time
from contextlib import ExitStack

import openai
import pytest

from tests.conftest import app_of, config_of, running_system

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

MODEL = "scripted"
FACT = "The safe of the north wing opens with 4711."
QUESTION = "How does the safe of the north wing open?"


@pytest.fixture(scope="module")
def system():
    config = config_of("scripted")
    app_of(config, "build_model")["deployments"] = [{"name": "LLMReplica", "num_replicas": 1}]
    with running_system(config) as system:
        yield system


def keys(system, *words):
    """`shoal keys …` against the running system's own config file; returns stdout."""
    result = subprocess.run(
        [
            *(sys.executable, "-c", "from app.cli import main; main()", "keys", *words),
            *("--config", str(system.data_dir / "config.yaml")),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture(scope="module")
def client_of(system):
    """A client with a new key: `client_of("acme", "--rpm", "2")`."""
    with ExitStack() as open_clients:

        def make(tenant, *options):
            key = keys(system, "create", "--tenant", tenant, *options)
            assert re.fullmatch(r"sk-[0-9a-f]{16}-\S+", key)
            return open_clients.enter_context(_client(system, key))

        yield make


def _client(system, key):
    return openai.OpenAI(base_url=f"{system.http}/v1", api_key=key, max_retries=0, timeout=60)


def ask(client, text="hello there", **more):
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.with_raw_response.create(model=MODEL, messages=messages, **more)


def test_without_a_good_key_nothing_is_answered(system, client_of):
    good = client_of("acme")
    assert ask(good).http_response.status_code == 200
    for bad in ("none", "sk-0123456789abcdef-forged", good.api_key[:-1] + "#", good.api_key[:-1]):
        with _client(system, bad) as client:
            with pytest.raises(openai.AuthenticationError) as refused:
                ask(client)
            assert refused.value.code == "invalid_api_key"
            assert refused.value.response.headers["www-authenticate"] == "Bearer"
            for call in (client.models.list, client.files.list, client.vector_stores.list):
                with pytest.raises(openai.AuthenticationError):
                    call()


def test_a_key_does_what_its_scopes_say_and_no_more(client_of):
    inference = client_of("acme", "--scope", "inference")
    documents = client_of("acme", "--scope", "documents")
    assert ask(inference).http_response.status_code == 200
    store = documents.vector_stores.create(name="scoped")
    retrieval = {"retrieval": {"vector_store_ids": [store.id]}}
    for call in (
        lambda: ask(documents),
        lambda: documents.embeddings.create(model="scripted-embedding", input="x"),
        inference.files.list,
        lambda: inference.vector_stores.create(name="x"),
        lambda: ask(inference, extra_body=retrieval),
    ):
        with pytest.raises(openai.PermissionDeniedError) as refused:
            call()
        assert refused.value.code == "permission_denied"
        assert "scope" in refused.value.message


def test_requests_per_minute_are_counted_and_refused_with_the_time_to_wait(client_of):
    client = client_of("busy", "--rpm", "3")
    for left in (2, 1, 0):
        headers = ask(client, max_tokens=2).headers
        assert headers["x-ratelimit-limit-requests"] == "3"
        assert int(headers["x-ratelimit-remaining-requests"]) == left
        assert headers["x-ratelimit-reset-requests"]
    with pytest.raises(openai.RateLimitError) as refused:
        ask(client)
    headers = refused.value.response.headers
    assert refused.value.code == "rate_limit_exceeded"
    assert 1 <= int(headers["retry-after"]) <= 20  # one request of three comes back in 20 s
    assert headers["x-ratelimit-remaining-requests"] == "0"
    # Another key of the same tenant has its own.
    assert ask(client_of("busy")).http_response.status_code == 200


def test_tokens_per_minute_are_reserved_and_what_was_not_used_is_given_back(client_of):
    client = client_of("wordy", "--tpm", "300")

    def left(answer):
        assert answer.headers["x-ratelimit-limit-tokens"] == "300"
        return int(answer.headers["x-ratelimit-remaining-tokens"])

    first = ask(client)
    used = first.parse().usage.total_tokens
    assert left(first) < 200  # reserved for an answer of unknown length
    assert used < 50
    deadline = time.monotonic() + 10
    while (now := left(ask(client, max_tokens=1))) < 200:  # settled right after the answer
        assert time.monotonic() < deadline, now
        time.sleep(0.1)
    with pytest.raises(openai.RateLimitError) as refused:
        _ask_often(client)
    assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60
    assert int(refused.value.response.headers["x-ratelimit-remaining-tokens"]) < 205
    assert "tokens per minute" in refused.value.message
    with pytest.raises(openai.BadRequestError) as never:  # no minute would be enough
        ask(client, "word " * 200, max_tokens=1)
    assert "300 per minute" in never.value.message


def _ask_often(client):
    for _ in range(10):  # 205 tokens each: more than come back between two of them
        ask(client, "word " * 100, max_tokens=1)


def test_the_limits_of_a_tenant_are_shared_by_its_keys(system, client_of):
    keys(system, "limits", "together", "--rpm", "2")
    one, two = client_of("together"), client_of("together")
    ask(one, max_tokens=2)
    ask(two, max_tokens=2)
    for client in (one, two):
        with pytest.raises(openai.RateLimitError) as refused:
            ask(client)
        assert "tenant" in refused.value.message


def test_a_revoked_key_is_refused_at_once_and_stays_in_the_list(system, client_of):
    client = client_of("leaving", "--name", "laptop")
    assert ask(client).http_response.status_code == 200  # the gateway knows it now
    listed = json.loads(keys(system, "list", "--tenant", "leaving", "--json"))
    assert [(record["name"], record["state"]) for record in listed] == [("laptop", "active")]
    assert client.api_key not in json.dumps(listed)
    keys(system, "revoke", listed[0]["id"])
    with pytest.raises(openai.AuthenticationError):
        _refused_within(client, 10)  # what gateways know by heart lasts longer
    [record] = json.loads(keys(system, "list", "--tenant", "leaving", "--json"))
    assert record["state"] == "revoked"


def _refused_within(client, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ask(client, max_tokens=1)
        time.sleep(0.1)


def test_no_tenant_sees_anything_of_another(client_of):
    mine, theirs = client_of("mine"), client_of("theirs")
    store = mine.vector_stores.create(name="private")
    file = mine.vector_stores.files.upload_and_poll(
        vector_store_id=store.id, file=("safe.txt", FACT.encode())
    )
    assert file.status == "completed"
    asked = {"text": QUESTION, "extra_body": {"retrieval": {"vector_store_ids": [store.id]}}}
    assert FACT in ask(mine, **asked).parse().choices[0].message.content

    own = theirs.vector_stores.create(name="private")
    assert [found.id for found in theirs.vector_stores.list()] == [own.id]
    assert list(theirs.files.list()) == []
    for call in (
        lambda: theirs.files.retrieve(file.id),
        lambda: theirs.files.content(file.id),
        lambda: theirs.files.delete(file.id),
        lambda: theirs.vector_stores.retrieve(store.id),
        lambda: theirs.vector_stores.update(store.id, name="taken"),
        lambda: theirs.vector_stores.delete(store.id),
        lambda: theirs.vector_stores.files.list(store.id),
        lambda: theirs.vector_stores.files.retrieve(file.id, vector_store_id=store.id),
        lambda: theirs.vector_stores.files.content(file.id, vector_store_id=store.id),
        lambda: theirs.vector_stores.files.create(own.id, file_id=file.id),
        lambda: theirs.vector_stores.search(store.id, query=QUESTION),
        lambda: ask(theirs, **asked),
        lambda: ask(theirs, **asked, stream=True),
    ):
        with pytest.raises(openai.NotFoundError) as hidden:
            call()
        assert "mine" not in hidden.value.message
    # What a stranger may not see is also still there.
    assert mine.files.retrieve(file.id).filename == "safe.txt"
    assert [found.filename for found in mine.vector_stores.search(store.id, query=QUESTION)] == ["safe.txt"]
