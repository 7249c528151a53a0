"""Bad input from outside: each is refused with OpenAI's error or a failed file, and nothing in the system notices."""

import io
import time
import zipfile

import httpx
import openai
import pytest
from reportlab.lib import pdfencrypt
from reportlab.pdfgen import canvas

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

MODEL = "scripted"


def actors(system):
    """Actor ids of every replica that runs: one that was restarted has another."""
    return {
        replica["actor_id"]
        for app in system.status().values()
        for deployment in app["deployments"].values()
        for replica in deployment["replicas"]
        if replica["state"] == "RUNNING"
    }


@pytest.fixture(autouse=True)
def nothing_restarts(scripted):
    for app, status in scripted.status().items():
        if status["status"] != "RUNNING":  # another file's test may have broken an engine
            scripted.wait_for(app)
    before = actors(scripted)
    yield
    assert before <= actors(scripted)
    with openai.OpenAI(base_url=f"{scripted.http}/v1", api_key="none", max_retries=0, timeout=30) as client:
        answer = client.chat.completions.create(model=MODEL, messages=user("still there?"))
    assert answer.choices[0].message.content


@pytest.fixture
def client(scripted):
    with openai.OpenAI(base_url=f"{scripted.http}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def user(text):
    return [{"role": "user", "content": text}]


# --- requests ----------------------------------------------------------------------------------------

CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("path", "body", "wanted"),
    [
        (CHAT, {"model": "nope", "messages": user("x")}, (404, "model_not_found", "model")),
        (CHAT, {"model": MODEL, "messages": []}, (400, "invalid_request", "messages")),
        (CHAT, {"model": MODEL}, (400, "invalid_request", "messages")),
        (
            CHAT,
            {"model": MODEL, "messages": user("x"), "max_tokens": -1},
            (400, "invalid_request", "max_tokens"),
        ),
        (
            CHAT,
            {"model": MODEL, "messages": user("word " * 20_000)},
            (400, "context_length_exceeded", "messages"),
        ),
        (
            CHAT,
            {"model": MODEL, "messages": user("x"), "retrieval": {"vector_store_ids": ["vs_none"]}},
            (404, "not_found", None),
        ),
        ("/v1/completions", {"model": "nope", "prompt": "x"}, (404, "model_not_found", "model")),
        ("/v1/embeddings", {"model": "nope", "input": "x"}, (404, "model_not_found", "model")),
        ("/v1/embeddings", {"model": "scripted-embedding", "input": []}, (400, "invalid_request", "input")),
        ("/v1/vector_stores/vs_none/search", {"query": "x"}, (404, "not_found", None)),
        ("/v1/vector_stores/vs_none/files", {"file_id": "file-none"}, (404, "not_found", None)),
        ("/v1/vector_stores", {"file_ids": ["file-none"]}, (404, "not_found", None)),
    ],
)
def test_a_wrong_request_is_refused_with_openais_error(scripted, path, body, wanted):
    status, code, param = wanted
    streams = [{}, {"stream": True}] if path == CHAT else [{}]
    for more in streams:
        response = httpx.post(f"{scripted.http}{path}", json={**body, **more}, timeout=30)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (status, code), error
        assert param is None or error["param"] == param
        assert error["message"]
        assert error["type"] == "invalid_request_error"
        assert response.headers["x-request-id"]
        assert response.headers["server-timing"]
        assert "Traceback" not in response.text


@pytest.mark.parametrize("body", [b"{broken", b"", b"[1, 2]", b'{"model": "\xff"}', b"[" * 100_000])
def test_a_body_that_is_no_json_object_is_refused(scripted, body):
    for path in (CHAT, "/v1/embeddings", "/v1/vector_stores"):
        response = httpx.post(f"{scripted.http}{path}", content=body, headers=JSON, timeout=30)
        if (path, body) == ("/v1/vector_stores", b""):
            continue  # OpenAI's clients may leave out a body of options only
        assert response.status_code == 400, (path, body[:20], response.text)
        assert response.json()["error"]["message"]


def test_a_body_over_the_limit_is_refused_fast(scripted):
    body = b'{"model": "scripted", "messages": [{"role": "user", "content": "' + b"x" * 14_000_000 + b'"}]}'
    started = time.perf_counter()
    response = httpx.post(f"{scripted.http}{CHAT}", content=body, headers=JSON, timeout=30)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "payload_too_large"
    assert "10000000" in response.json()["error"]["message"]
    assert time.perf_counter() - started < 3


def test_an_unknown_store_is_not_found_by_the_client(client):
    for call in (
        lambda: client.vector_stores.retrieve("vs_none"),
        lambda: client.vector_stores.search("vs_none", query="x"),
        lambda: client.vector_stores.files.list("vs_none"),
        lambda: client.vector_stores.delete("vs_none"),
        lambda: client.files.retrieve("file-none"),
    ):
        with pytest.raises(openai.NotFoundError):
            call()


def test_an_empty_upload_is_refused(client):
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.create(file=("empty.txt", b""), purpose="assistants")
    assert "empty" in refused.value.message
    with pytest.raises(openai.BadRequestError):
        client.files.create(file=("a.txt", b"text"), purpose="no-such-purpose")


# --- files -------------------------------------------------------------------------------------------


def encrypted_pdf():
    out = io.BytesIO()
    page = canvas.Canvas(out, encrypt=pdfencrypt.StandardEncryption("secret", canPrint=0))
    page.drawString(72, 700, "nobody reads this")
    page.save()
    return out.getvalue()


def zip_bomb():
    """A DOCX of a few hundred kilobytes that unpacks to 300 MB."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")
        with archive.open("word/document.xml", "w", force_zip64=True) as entry:
            for _ in range(300):
                entry.write(b" " * 1_000_000)
    return out.getvalue()


def test_files_that_cannot_be_read_fail_with_a_reason_and_the_good_one_is_ingested(client):
    store = client.vector_stores.create(name="mixed")
    files = {
        "picture.png": (b"\x89PNG\r\n\x1a\n" + bytes(200), "unsupported_file", "not supported"),
        "program.exe": (b"MZ" + bytes(200), "unsupported_file", "not supported"),
        "secret.pdf": (encrypted_pdf(), "invalid_file", "encrypted"),
        "broken.pdf": (b"%PDF-1.7\nnothing that follows", "invalid_file", "damaged"),
        "bomb.docx": (zip_bomb(), "invalid_file", "zip bomb"),
        "blank.txt": (b" \n ", "invalid_file", "empty"),
        "good.txt": (b"The good one says cinnamon.", None, None),
    }
    batch = client.vector_stores.file_batches.upload_and_poll(
        store.id, files=[(name, data) for name, (data, *_) in files.items()]
    )
    assert (batch.file_counts.completed, batch.file_counts.failed) == (1, 6)
    seen = {
        client.files.retrieve(file.id).filename: file for file in client.vector_stores.files.list(store.id)
    }
    assert set(seen) == set(files)
    for name, (_, code, words) in files.items():
        file = seen[name]
        assert file.status == ("failed" if code else "completed"), name
        if code:
            assert file.last_error.code == code, name
            assert words in file.last_error.message, (name, file.last_error.message)
    assert [found.filename for found in client.vector_stores.search(store.id, query="cinnamon")] == [
        "good.txt"
    ]
