"""configs/local.yaml as the README has a new user run it: real model, Chroma, Valkey; from the command to Ctrl-C.

One system serves the whole file, in its order: the last test ends it and starts it again.
"""

import base64
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openai
import psutil
import pytest
import yaml
from reportlab.pdfgen import canvas

from tests.benchmarks.processes import memory_by_role
from tests.conftest import ROOT, app_of, config_of, free_port

pytestmark = [pytest.mark.cluster, pytest.mark.local, pytest.mark.timeout(300)]

MODEL = "smollm2-135m-instruct"
EMBEDDINGS = "all-MiniLM-L6-v2"
CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]
FACT = "Every employee of Shoal Industries has 27 days of paid leave per year."
QUESTION = "How many days of paid leave does an employee have?"
START_S, STOP_S = 240, 60
REPLICA_WAIT_S = 2.0  # actors.handles.embedder
RETRIEVAL_S = 2.0  # RetrievalSettings.deadline_s
MOST_MB = 8000


@dataclass
class Local:
    """A running `serve run`."""

    url: str
    process: subprocess.Popen
    log: Path


def config_in(folder):
    """configs/local.yaml, kept apart from other systems of this machine."""
    config, port = config_of("local"), free_port()
    config["http_options"]["port"] = port
    chroma_port = free_port()
    for app in config["applications"]:
        if "storage" in app["args"]:
            app["args"]["storage"] |= {"data_dir": f"{folder}/data", "chroma_port": chroma_port}
    app_of(config, "build_gateway")["args"]["announce_url"] = f"http://127.0.0.1:{port}"
    return config


@contextmanager
def serve_run(config, folder, name) -> Iterator[Local]:
    """The README's command, in a terminal's foreground process group; killed if a test leaves it running."""
    path, log = folder / f"{name}.yaml", folder / f"{name}.log"
    path.write_text(yaml.safe_dump(config))
    with log.open("w") as output:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("serve")), "run", str(path)],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "RAY_AUTH_MODE": "token", "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
            # Whoever runs the tests in the background ignores Ctrl-C, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509  no threads matter
        )
    tree = []
    try:
        yield Local(f"http://127.0.0.1:{config['http_options']['port']}", process, log)
    finally:
        if process.poll() is None:
            tree = processes(process)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for left in alive(tree):
            left.kill()


def processes(process):
    """A process and everything below it."""
    root = psutil.Process(process.pid)
    return [root, *root.children(recursive=True)]


def alive(found):
    return [one for one in found if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def wait(local, condition, timeout_s=START_S):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert local.process.poll() is None, f"it ended:\n{local.log.read_text()[-4000:]}"
        assert time.monotonic() < deadline, f"not within {timeout_s} s:\n{local.log.read_text()[-4000:]}"
        time.sleep(0.2)


def ctrl_c(local):
    """What a terminal does, once; returns the seconds until the command and all that it started are gone."""
    tree, started = processes(local.process), time.monotonic()
    os.killpg(local.process.pid, signal.SIGINT)
    local.process.wait(STOP_S)
    psutil.wait_procs(tree, timeout=5)
    left = [" ".join(one.cmdline())[:120] for one in alive(tree)]
    assert not left, f"still running: {left}"
    return time.monotonic() - started


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # Short: a unix socket's path has at most 107 bytes.
    return tmp_path_factory.mktemp("local")


@pytest.fixture(scope="module")
def local(folder):
    with serve_run(config_in(folder), folder, "local") as local:
        started = time.monotonic()
        wait(local, lambda: "Shoal is ready" in local.log.read_text())
        print(f"\nready after {time.monotonic() - started:.0f} s")
        yield local


@pytest.fixture(scope="module")
def client(local):
    with openai.OpenAI(base_url=f"{local.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def store(client, folder):
    """A store with one PDF."""
    path = folder / "handbook.pdf"
    page = canvas.Canvas(str(path))
    for number, line in enumerate(
        ("Shoal Industries: employee handbook", FACT, "The canteen opens at noon.")
    ):
        page.drawString(72, 700 - 20 * number, line)
    page.save()
    store = client.vector_stores.create(name="handbook")
    with path.open("rb") as handbook:
        file = client.vector_stores.files.upload_and_poll(vector_store_id=store.id, file=handbook)
    assert (file.status, file.last_error) == ("completed", None)
    return store


def test_it_says_how_to_call_it(local):
    printed = local.log.read_text()
    assert f"{local.url}/v1" in printed
    assert "Traceback" not in printed


def test_a_chat_is_answered_whole_and_streamed(client):
    whole = client.chat.completions.create(model=MODEL, messages=CAPITAL, temperature=0, max_tokens=40)
    assert "Paris" in whole.choices[0].message.content
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    with client.chat.completions.create(
        model=MODEL, messages=CAPITAL, temperature=0, max_tokens=40, stream=True
    ) as stream:
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len([piece for piece in pieces if piece]) > 3


def test_a_text_is_completed(client):
    answer = client.completions.create(
        model=MODEL, prompt="The capital of France is", temperature=0, max_tokens=8
    )
    assert "Paris" in answer.choices[0].text
    assert answer.usage.completion_tokens <= 8


def test_embeddings_mean_something_and_are_the_same_in_both_encodings(client):
    texts = ["A cat sleeps on the sofa.", "A kitten naps on the couch.", "Interest rates rose again."]
    numbers = client.embeddings.create(model=EMBEDDINGS, input=texts, encoding_format="float")
    packed = client.embeddings.with_raw_response.create(
        model=EMBEDDINGS, input=texts, encoding_format="base64"
    )
    cat, kitten, rates = (np.array(row.embedding) for row in numbers.data)
    assert len(cat) == 384
    assert cat @ kitten > 0.5 > cat @ rates
    for row, raw in zip(numbers.data, packed.http_response.json()["data"], strict=True):
        decoded = np.frombuffer(base64.b64decode(raw["embedding"]), dtype="<f4")
        np.testing.assert_allclose(decoded, row.embedding, atol=1e-5)


def test_the_models_are_listed(client):
    assert {MODEL, EMBEDDINGS} <= {model.id for model in client.models.list()}


def test_a_chat_over_a_pdf_uses_its_passage_and_cites_it(client, store):
    [best, *_] = client.vector_stores.search(store.id, query=QUESTION)
    assert best.filename == "handbook.pdf"
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=60,
        extra_body={"retrieval": {"vector_store_ids": [store.id]}},
    )
    message = answer.choices[0].message
    assert "27" in message.content
    assert next((note.type, note.model_extra["filename"]) for note in message.annotations) == (
        "file_citation",
        "handbook.pdf",
    )


def test_a_document_that_takes_seconds_to_embed_is_ingested(client, store):
    started = time.monotonic()
    words = " ".join(
        f"Paragraph {n} of the long report says that measure {n * 7} was taken." for n in range(1200)
    )
    file = client.vector_stores.files.upload_and_poll(
        vector_store_id=store.id, file=("report.txt", words.encode())
    )
    assert (file.status, file.last_error) == ("completed", None)
    assert time.monotonic() - started > REPLICA_WAIT_S, "too short to prove anything"
    client.vector_stores.files.delete(vector_store_id=store.id, file_id=file.id)


def test_the_readmes_own_example_runs_as_it_stands(local, store, folder):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    [example] = [block for block in blocks if "OpenAI(" in block]
    example = example.replace("http://127.0.0.1:8000", local.url)
    result = subprocess.run(
        [sys.executable, "-c", example], cwd=folder, capture_output=True, text=True, timeout=180, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "handbook.pdf" in result.stdout


def test_all_of_it_takes_less_than_8_gb(local, client, store):
    used = memory_by_role(local.process.pid)
    print("\n" + "\n".join(f"{role:26}{megabytes:7.0f} MB" for role, megabytes in used.most_common()))
    print(f"{'together':26}{used.total():7.0f} MB")
    assert {"engine core", "valkey", "chroma"} <= set(used)
    assert used.total() < MOST_MB


def embedder_of(local):
    tree = psutil.Process(local.process.pid).children(recursive=True)
    return [one for one in tree if re.search(r"ServeReplica:retrieval:Embedder", " ".join(one.cmdline()))]


def test_without_its_embedder_it_finds_passages_by_their_words_and_says_when_to_retry(local, client, store):
    [embedder] = embedder_of(local)
    embedder.kill()
    with pytest.raises(openai.InternalServerError) as down:
        client.embeddings.create(model=EMBEDDINGS, input="x")
    assert (down.value.status_code, down.value.type) == (503, "server_error")
    assert int(down.value.response.headers["retry-after"]) >= 1
    started = time.monotonic()
    found = client.vector_stores.with_raw_response.search(store.id, query="Who gets paid leave per year?")
    assert time.monotonic() - started < RETRIEVAL_S + 1
    assert found.headers["x-shoal-degraded"] in ("embed=unavailable", "embed=timeout")
    assert [one.filename for one in found.parse().data] == ["handbook.pdf"]
    plain = client.chat.completions.create(model=MODEL, messages=CAPITAL, temperature=0, max_tokens=40)
    assert "Paris" in plain.choices[0].message.content

    def whole():
        try:
            client.embeddings.create(model=EMBEDDINGS, input="x")
        except openai.InternalServerError:
            return False
        raw = client.vector_stores.with_raw_response.search(store.id, query=f"At {time.time()}: paid leave?")
        return "x-shoal-degraded" not in raw.headers

    wait(local, whole, timeout_s=120)


def test_ctrl_c_ends_every_process_and_a_second_start_finds_the_data(local, store, folder):
    print(f"\ngone {ctrl_c(local):.1f} s after Ctrl-C")
    config = config_in(folder)
    config["applications"] = [app for app in config["applications"] if app["name"] != MODEL]
    with serve_run(config, folder, "second") as second:
        with openai.OpenAI(base_url=f"{second.url}/v1", api_key="none", max_retries=0, timeout=30) as client:

            def found():
                try:
                    return [one.filename for one in client.vector_stores.search(store.id, query=QUESTION)]
                except (openai.InternalServerError, openai.APIConnectionError, openai.NotFoundError):
                    return []  # its parts are still coming up

            wait(second, found, timeout_s=120)
            assert found() == ["handbook.pdf"]
            assert client.vector_stores.retrieve(store.id).name == "handbook"
            assert client.files.list().data
        print(f"\ngone {ctrl_c(second):.1f} s after Ctrl-C")
