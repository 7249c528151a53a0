"""Documents through the whole system with the official client: upload, search, chat with citations, the CLI.

The passages are found and quoted by the scripted parts; what a real model makes of them is `test_local`'s.
"""

import functools
import io
import subprocess
import sys
import time

import docx
import openai
import pytest
from reportlab.pdfgen import canvas

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

MODEL = "scripted"


def pdf(line):
    out = io.BytesIO()
    page = canvas.Canvas(out)
    page.drawString(72, 700, line)
    page.save()
    return out.getvalue()


def word(line):
    document, out = docx.Document(), io.BytesIO()
    document.add_heading("Handbook")
    document.add_paragraph(line)
    document.save(out)
    return out.getvalue()


# One fact per file type; each is found by words that no other file has.
FACTS = {
    "leave.txt": "Every employee has 27 days of annual leave.",
    "lighthouse.md": "The passphrase of the lighthouse is marzipan.",
    "office.html": "The Lisbon office opens at seven in the morning.",
    "travel.pdf": "Train journeys below four hours replace flights.",
    "pension.docx": "The pension fund pays eleven percent of the salary.",
}
QUESTIONS = {
    "leave.txt": "How many days of annual leave does an employee have?",
    "lighthouse.md": "What is the passphrase of the lighthouse?",
    "office.html": "When does the Lisbon office open?",
    "travel.pdf": "Which flights do train journeys replace?",
    "pension.docx": "What does the pension fund pay?",
}


@functools.cache  # PDF and DOCX carry the time at which they were made
def content(name):
    line = FACTS[name]
    if name.endswith(".pdf"):
        return pdf(line)
    if name.endswith(".docx"):
        return word(line)
    if name.endswith(".html"):
        return f"<html><style>p {{}}</style><body><h1>Offices</h1><p>{line}</p></body></html>".encode()
    return (f"# Notes\n\n{line}\n" if name.endswith(".md") else line).encode()


def asked(store, question, **more):
    """Arguments of a chat over one store."""
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": question}],
        "extra_body": {"retrieval": {"vector_store_ids": [store], **more}},
        "temperature": 0,
    }


@pytest.fixture(scope="module")
def client(scripted):
    with openai.OpenAI(base_url=f"{scripted.http}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def handbook(client):
    """A vector store with the five files: one uploaded alone, with attributes, the others as a batch."""
    store = client.vector_stores.create(name="handbook")
    first, *others = FACTS
    file = client.vector_stores.files.upload_and_poll(
        vector_store_id=store.id,
        file=(first, content(first)),
        attributes={"topic": "people", "year": 2026},
    )
    assert (file.status, file.last_error) == ("completed", None)
    batch = client.vector_stores.file_batches.upload_and_poll(
        store.id, files=[(name, content(name)) for name in others]
    )
    assert batch.status == "completed"
    assert (batch.file_counts.completed, batch.file_counts.total) == (4, 4)
    return client.vector_stores.retrieve(store.id)


def test_a_store_knows_its_files(client, handbook):
    assert (handbook.status, handbook.file_counts.completed, handbook.file_counts.total) == (
        "completed",
        5,
        5,
    )
    assert handbook.usage_bytes > 0
    listed = client.vector_stores.files.list(handbook.id)
    names = {client.files.retrieve(file.id).filename for file in listed}
    assert names == set(FACTS)
    assert handbook.id in [store.id for store in client.vector_stores.list()]


@pytest.mark.parametrize("name", FACTS)
def test_every_file_type_is_found_and_quoted(client, handbook, name):
    best, *_ = client.vector_stores.search(handbook.id, query=QUESTIONS[name])
    assert best.filename == name
    assert FACTS[name] in best.content[0].text
    answer = client.chat.completions.create(**asked(handbook.id, QUESTIONS[name]))
    message = answer.choices[0].message
    assert FACTS[name] in message.content
    assert "[1]" not in message.content
    note = message.annotations[0].model_dump()
    assert (note["type"], note["filename"], note["file_id"]) == ("file_citation", name, best.file_id)
    assert note["index"] == len(message.content)
    assert client.files.content(best.file_id).read() == content(name)


def test_a_streamed_answer_has_the_same_text_and_citations(client, handbook):
    arguments = asked(handbook.id, QUESTIONS["travel.pdf"])
    whole = client.chat.completions.create(**arguments).choices[0].message
    text, notes = "", []
    with client.chat.completions.create(**arguments, stream=True) as stream:
        for chunk in stream:
            delta = chunk.choices[0].delta
            text += delta.content or ""
            notes += delta.model_dump().get("annotations") or []
    assert text == whole.content
    # The client's own type knows url_citation only; ours comes as extra fields.
    assert notes == [{"type": note.type, **note.model_extra} for note in whole.annotations] != []


def test_retrieval_takes_its_part_of_the_time_and_says_so(client, handbook):
    raw = client.chat.completions.with_raw_response.create(**asked(handbook.id, QUESTIONS["leave.txt"]))
    stages = dict(part.split(";dur=") for part in raw.headers["server-timing"].split(", "))
    assert float(stages["retrieve"]) > 0
    assert "x-shoal-degraded" not in raw.headers


def test_filters_bounds_and_rankers_narrow_a_search(client, handbook):
    people = {"type": "eq", "key": "topic", "value": "people"}
    late = {"type": "gt", "key": "year", "value": 2030}

    def names(query, **options):
        return [found.filename for found in client.vector_stores.search(handbook.id, query=query, **options)]

    every = "What about the office, the pension fund and annual leave?"
    assert len(names(every)) > 1
    assert names(every, filters=people) == ["leave.txt"]
    assert names(every, filters={"type": "and", "filters": [people, late]}) == []
    assert len(names(every, max_num_results=1)) == 1
    assert names(every, ranking_options={"score_threshold": 1.0}) in ([], names(every)[:1])
    several = names([QUESTIONS["leave.txt"], QUESTIONS["travel.pdf"]], max_num_results=4)
    assert {"leave.txt", "travel.pdf"} <= set(several)


def test_filters_narrow_a_chat(client, handbook):
    people = {"type": "eq", "key": "topic", "value": "people"}
    answer = client.chat.completions.create(**asked(handbook.id, QUESTIONS["pension.docx"], filters=people))
    assert FACTS["pension.docx"] not in answer.choices[0].message.content


def test_a_deleted_file_is_not_found_any_more_and_the_others_are(client):
    store = client.vector_stores.create(name="short")
    for name in ("leave.txt", "lighthouse.md"):
        client.vector_stores.files.upload_and_poll(vector_store_id=store.id, file=(name, content(name)))

    def found():
        return {one.filename for one in client.vector_stores.search(store.id, query="leave and lighthouse")}

    assert found() == {"leave.txt", "lighthouse.md"}
    [leave] = client.vector_stores.search(store.id, query=QUESTIONS["leave.txt"], max_num_results=1)
    client.files.delete(leave.file_id)
    assert found() == {"lighthouse.md"}  # at once, not when the index has caught up
    with pytest.raises(openai.NotFoundError):
        client.vector_stores.files.retrieve(leave.file_id, vector_store_id=store.id)
    client.vector_stores.delete(store.id)
    with pytest.raises(openai.NotFoundError):
        client.vector_stores.search(store.id, query="lighthouse")


def test_embeddings_are_the_same_as_numbers_and_as_base64(client):
    texts = ["one text", "another text", "one text"]
    numbers = client.embeddings.create(model="scripted-embedding", input=texts, encoding_format="float")
    packed = client.embeddings.create(model="scripted-embedding", input=texts)  # base64 on the wire
    for number, pack in zip(numbers.data, packed.data, strict=True):
        assert number.embedding == pytest.approx(pack.embedding)
    assert numbers.data[0].embedding == numbers.data[2].embedding != numbers.data[1].embedding


# --- in the terminal ---------------------------------------------------------------------------------


def shoal(system, *words):
    return subprocess.run(
        [sys.executable, "-c", "from app.cli import main; main()", *words, "--url", system.http],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_folder_is_ingested_and_asked_in_the_terminal(scripted, tmp_path):
    for name in FACTS:
        (tmp_path / name).write_bytes(content(name))
    (tmp_path / "broken.pdf").write_bytes(b"no PDF at all")
    store = f"folder-{time.time_ns()}"
    first = shoal(scripted, "ingest", str(tmp_path), "--store", store)
    assert first.returncode == 1, first.stderr
    assert "failed  broken.pdf" in first.stderr
    assert "5 " in first.stdout
    (tmp_path / "broken.pdf").unlink()
    again = shoal(scripted, "ingest", str(tmp_path), "--store", store)
    assert (again.returncode, "5 unchanged" in again.stdout) == (0, True), again.stdout + again.stderr

    answer = shoal(scripted, "ask", QUESTIONS["pension.docx"], "--store", store)
    assert answer.returncode == 0, answer.stderr
    assert FACTS["pension.docx"] in answer.stdout
    assert "[1] pension.docx" in answer.stderr
    assert "retrieve " in answer.stderr


def test_a_question_to_an_unknown_store_ends_in_words(scripted):
    result = shoal(scripted, "ask", "anything?", "--store", "never-made")
    assert result.returncode == 1
    assert "never-made" in result.stderr
    assert "Traceback" not in result.stderr
