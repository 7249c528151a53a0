"""`/v1/batches` with the official client: JSONL in, JSONL out, one result for each line, whatever happens."""

import asyncio
import json

import openai
import pytest

from tests.chaos import faults
from tests.chaos.load import words

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

MODEL = "scripted"


@pytest.fixture
async def client(scripted):
    async with scripted.client() as client:
        yield client


def said(text, **body):
    """A line that is answered with its text."""
    messages = [{"role": "user", "content": text}]
    return ("/v1/chat/completions", {"model": MODEL, "messages": messages, "temperature": 0, **body})


def chat(number, **body):
    return said(f"line number {number}", **body)


async def submitted(client, requests, endpoint=None, **more):
    """A batch of (url, body) with custom ids l0, l1, …"""
    lines = [
        json.dumps({"custom_id": f"l{n}", "method": "POST", "url": url, "body": body})
        for n, (url, body) in enumerate(requests)
    ]
    file = await client.files.create(file=("in.jsonl", "\n".join(lines).encode()), purpose="batch")
    return await client.batches.create(
        input_file_id=file.id, endpoint=endpoint or requests[0][0], completion_window="24h", **more
    )


async def ended(client, batch):
    async with asyncio.timeout(120):
        while batch.status in ("validating", "in_progress", "finalizing", "cancelling"):
            await asyncio.sleep(0.1)
            batch = await client.batches.retrieve(batch.id)
    return batch


async def results(client, file_id):
    """The lines of a result file by custom id; each stands in it once."""
    content = (await client.files.content(file_id)).text
    lines = [json.loads(line) for line in content.splitlines()]
    found = {line["custom_id"]: line for line in lines}
    assert len(found) == len(lines)
    return found


async def test_every_line_has_its_answer_or_its_error(client):
    requests = [chat(n) for n in range(60)]
    requests[7] = chat(7, temperature=9)
    requests[8] = ("/v1/chat/completions", {"model": "nope", "messages": [{"role": "user", "content": "x"}]})
    requests[9] = chat(9, stream=True)
    batch = await submitted(client, requests, metadata={"a": "b"})
    assert (batch.status, batch.metadata, batch.object) == ("validating", {"a": "b"}, "batch")
    done = await ended(client, batch)
    counts = done.request_counts
    assert (done.status, counts.total, counts.completed, counts.failed) == ("completed", 60, 57, 3)
    answers = await results(client, done.output_file_id)
    failures = await results(client, done.error_file_id)
    assert set(answers) | set(failures) == {f"l{n}" for n in range(60)}
    for name, line in answers.items():
        body = line["response"]["body"]
        assert line["response"]["status_code"] == 200
        assert body["choices"][0]["message"]["content"].endswith(f"line number {name[1:]}")
    assert {name: line["response"]["status_code"] for name, line in failures.items()} == {
        "l7": 400, "l8": 404, "l9": 400,
    }  # fmt: skip
    assert "temperature" in failures["l7"]["response"]["body"]["error"]["message"]
    listed = await client.batches.list(limit=1)
    assert listed.data[0].id == done.id
    assert (await client.files.retrieve(done.output_file_id)).purpose == "batch_output"


@pytest.mark.parametrize(
    ("url", "body", "content"),
    [
        ("/v1/completions", {"model": MODEL, "prompt": "one two"}, lambda body: body["choices"][0]["text"]),
        (
            "/v1/responses",
            {"model": MODEL, "input": "one two"},
            lambda body: body["output"][0]["content"][0]["text"],
        ),
        (
            "/v1/embeddings",
            {"model": "scripted-embedding", "input": ["one", "two"]},
            lambda body: len(body["data"]) == 2 and body["data"][1]["embedding"],
        ),
    ],
)
async def test_the_other_endpoints_answer_lines_too(client, url, body, content):
    done = await ended(client, await submitted(client, [(url, body)] * 2))
    assert (done.status, done.error_file_id) == ("completed", None)
    for line in (await results(client, done.output_file_id)).values():
        assert content(line["response"]["body"])


async def test_an_invalid_file_fails_as_a_whole_and_says_where(client):
    batch = await submitted(client, [chat(0), chat(1), ("/v1/embeddings", {})])
    failed = await ended(client, batch)
    assert (failed.status, failed.output_file_id) == ("failed", None)
    [error] = failed.errors.data
    assert (error.line, error.code, error.param) == (3, "invalid_url", "url")
    file = await client.files.create(file=("in.jsonl", b"\n\n"), purpose="batch")
    ask = {"endpoint": "/v1/embeddings", "completion_window": "24h"}
    failed = await ended(client, await client.batches.create(input_file_id=file.id, **ask))
    assert failed.errors.data[0].code == "empty_file"
    other = await client.files.create(file=("in.txt", b"x"), purpose="assistants")
    with pytest.raises(openai.BadRequestError, match="purpose"):
        await client.batches.create(input_file_id=other.id, **ask)
    with pytest.raises(openai.NotFoundError):
        await client.batches.create(input_file_id="file-none", **ask)


async def test_a_cancelled_batch_keeps_what_it_has(client):
    batch = await submitted(client, [chat(0), *(said(words(n, 3000)) for n in range(100))])
    async with asyncio.timeout(60):
        while (await client.batches.retrieve(batch.id)).request_counts.completed < 1:
            await asyncio.sleep(0.1)
    assert (await client.batches.cancel(batch.id)).status == "cancelling"
    done = await ended(client, batch)
    assert (done.status, done.request_counts.completed, done.request_counts.total) == ("cancelled", 1, 101)
    assert set(await results(client, done.output_file_id)) == {"l0"}
    with pytest.raises(openai.ConflictError):
        await client.batches.cancel(batch.id)


@pytest.mark.chaos
async def test_a_batch_survives_its_runner_and_answers_each_line_once(scripted, client):
    batch = await submitted(client, [said(words(n, 100)) for n in range(400)])
    async with asyncio.timeout(60):
        while not 0 < (await client.batches.retrieve(batch.id)).request_counts.completed < 400:
            await asyncio.sleep(0.05)
    [runner] = faults.pids(scripted, "retrieval", "JobRunner")
    faults.kill(runner)
    done = await ended(client, batch)
    assert (done.status, done.request_counts.completed, done.request_counts.failed) == ("completed", 400, 0)
    answers = await results(client, done.output_file_id)
    texts = [answers[f"l{n}"]["response"]["body"]["choices"][0]["message"]["content"] for n in range(400)]
    assert texts == [words(n, 100) for n in range(400)]
    scripted.wait_for("retrieval")
