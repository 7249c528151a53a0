"""Parts of retrieval slow or dead: the chat is answered in time, says what is missing, and gets whole again.

A dead embedder is `test_local`'s: the scripted one is back before anybody misses it.
"""

import signal
import time
from contextlib import contextmanager

import openai
import psutil
import pytest

from tests.conftest import app_of, config_of, running_system

pytestmark = [pytest.mark.cluster, pytest.mark.chaos, pytest.mark.timeout(180)]

MODEL = "scripted"
FACT = "The harbour gate closes at nine in the evening."
QUESTION = "When does the harbour gate close?"
DEADLINE_S = 2.0  # RetrievalSettings.deadline_s
MARGIN_S = 1.0  # for the chat itself, on a machine that does more than this test


@pytest.fixture(scope="module")
def system():
    config = config_of("scripted", auth={"mode": "open"})
    app_of(config, "build_model")["deployments"] = [{"name": "LLMReplica", "num_replicas": 1}]
    with running_system(config) as system:
        yield system


@pytest.fixture(scope="module")
def client(system):
    with openai.OpenAI(base_url=f"{system.http}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def store(client):
    store = client.vector_stores.create(name="harbour")
    file = client.vector_stores.files.upload_and_poll(
        vector_store_id=store.id, file=("harbour.txt", FACT.encode())
    )
    assert file.status == "completed"
    return store.id


def ask(client, store=None, question=QUESTION):
    """An answer's text, its `x-shoal-degraded` and its seconds."""
    started = time.monotonic()
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        extra_body={"retrieval": {"vector_store_ids": [store]}} if store else {},
    )
    took_s = time.monotonic() - started
    return raw.parse().choices[0].message, raw.headers.get("x-shoal-degraded", ""), took_s


def check_whole_within(client, store, seconds):
    deadline = time.monotonic() + seconds
    while (answer := ask(client, store))[1]:
        assert time.monotonic() < deadline, answer
        time.sleep(0.3)
    assert FACT in answer[0].content


def check_plain_chat(client):
    message, degraded, took_s = ask(client)
    assert (message.content, degraded) == (QUESTION, "")
    assert took_s < MARGIN_S


def chroma_of(system):
    """The Chroma process of this system and of no other on the machine."""
    tree = psutil.Process(system.process.pid).children(recursive=True)
    [chroma] = [process for process in tree if "chromadb_rust_bindings" in " ".join(process.cmdline())]
    return chroma


def replica_of(system, app, deployment):
    [replica] = [
        replica
        for replica in system.status()[app]["deployments"][deployment]["replicas"]
        if replica["state"] == "RUNNING"
    ]
    return psutil.Process(replica["pid"])


@contextmanager
def stopped(process):
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        if process.is_running():
            process.send_signal(signal.SIGCONT)


def test_a_chroma_that_hangs_costs_its_part_of_the_answer_and_no_more(system, client, store):
    check_whole_within(client, store, 10)
    with stopped(chroma_of(system)):
        for _ in range(6):  # enough failures to open the circuit
            message, degraded, took_s = ask(client, store)
            assert degraded in {"vector=timeout", "vector=unavailable"}
            assert took_s < DEADLINE_S + MARGIN_S
            assert FACT in message.content  # found by its words
            assert message.annotations
        assert (degraded, took_s < MARGIN_S) == ("vector=unavailable", True)  # not asked any more
        check_plain_chat(client)
    check_whole_within(client, store, 20)


def test_a_chroma_that_is_killed_is_restarted_and_asked_again(system, client, store):
    before = chroma_of(system)
    before.send_signal(signal.SIGKILL)
    message, degraded, took_s = ask(client, store, question=f"{QUESTION} Today?")
    assert took_s < DEADLINE_S + MARGIN_S
    assert FACT in message.content
    assert degraded in ("", "vector=unavailable", "vector=timeout")
    check_plain_chat(client)
    check_whole_within(client, store, 20)
    assert chroma_of(system).pid != before.pid


def test_a_retriever_that_hangs_costs_the_context_and_never_the_chat(system, client, store):
    with stopped(replica_of(system, "retrieval", "Retriever")):
        message, degraded, took_s = ask(client, store)
        assert degraded == "retrieval=timeout"
        assert DEADLINE_S - 0.1 < took_s < DEADLINE_S + MARGIN_S
        assert message.content == QUESTION  # said back, for want of passages
        assert not message.annotations
        check_plain_chat(client)
        with pytest.raises(openai.APIStatusError) as late:
            client.vector_stores.search(store, query=QUESTION)
        assert late.value.status_code == 504
    check_whole_within(client, store, 20)
