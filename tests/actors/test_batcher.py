"""Batches over a Redis and a document store of this process: crashes between any two checkpoints, and memory."""

import asyncio
import json
import os
import tracemalloc
import uuid
from pathlib import Path

import fakeredis
import pytest

from actors.batcher import Batcher
from actors.errors import FailedEverywhere, InvalidRequest, NotFound, Overloaded, Unavailable
from actors.job_loop import JobLoop, JobLoopConfig
from actors.policies.batches import KIND, BadLine, BatchTask, parse_line
from actors.stores.batches import Batches, BatchLog
from actors.stores.catalog import Catalog
from actors.stores.documents import DocumentStore
from actors.stores.jobs import JobLog, JobLogConfig
from actors.types import Principal
from actors.webhooks import WebhookConfig, WebhookOutbox

T = "acme"
ENDPOINT = "/v1/chat/completions"
LINES = int(os.environ.get("SHOAL_LINES", "2000"))


class App:
    """Answers with the line's number; `errors` are raised first, by number."""

    def __init__(self):
        self.errors: dict[int, list] = {}
        self.answered: list[int] = []
        self.running = self.most = 0
        self.delay_s = 0.0
        self.gate = asyncio.Event()
        self.gate.set()

    async def answer(self, task, body):
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.gate.wait()
            await asyncio.sleep(self.delay_s)
            if self.errors.get(body["n"]):
                raise self.errors[body["n"]].pop(0)
            self.answered.append(body["n"])
            return {"n": body["n"]}
        finally:
            self.running -= 1

    def error_body(self, error):
        return {"error": {"message": error.message}}


class World:
    def __init__(self, tmp_path, lease_s=0.5):
        self.redis = fakeredis.FakeAsyncRedis(protocol=2, socket_timeout=None)
        self.jobs = JobLog(self.redis, JobLogConfig(lease_s=lease_s))
        self.batches = Batches(self.redis, self.jobs, 1000)
        self.documents = DocumentStore(f"file://{tmp_path}")
        self.catalog = Catalog(self.redis)
        self.app = App()

    def loop(self, concurrency=8):
        batcher = Batcher(
            log=BatchLog(self.redis), catalog=self.catalog, documents=self.documents, app=self.app,
            webhooks=WebhookOutbox(self.jobs, WebhookConfig()), concurrency=concurrency,
        )  # fmt: skip
        return JobLoop(self.jobs, batcher, JobLoopConfig(poll_s=0.05))

    async def submit(self, lines):
        async def pieces():
            for at in range(0, len(lines), 1000):
                yield b"".join(line + b"\n" for line in lines[at : at + 1000])

        await self.documents.put_source(T, "file-in", pieces())
        batch_id = f"batch_{uuid.uuid4().hex}"
        task = BatchTask(
            batch_id=batch_id, principal=Principal(tenant=T), endpoint=ENDPOINT, input_file_id="file-in",
            cache_salt="s",
        )  # fmt: skip
        return await self.batches.accept(task, b"{}", 1, "m")

    async def ended(self, batch_id, timeout_s=120):
        async with asyncio.timeout(timeout_s):
            while True:
                batch = await self.batches.get(T, batch_id)
                if batch.status in ("completed", "failed", "cancelled", "expired"):
                    return batch
                await asyncio.sleep(0.02)

    async def results(self, file_id):
        content = b"".join([piece async for piece in self.documents.read_source(T, file_id)])
        return [json.loads(line) for line in content.splitlines()]


@pytest.fixture
async def world(tmp_path):
    world = World(tmp_path)
    yield world
    await world.redis.aclose()


def line(number, **more):
    wire = {"custom_id": f"l{number}", "method": "POST", "url": ENDPOINT, "body": {"n": number}}
    return json.dumps({**wire, **more}).encode()


async def test_lines_that_fail_are_tried_again_or_stand_in_the_error_file(world, monkeypatch):
    monkeypatch.setattr("actors.batcher._MOST_PAUSE_S", 0.01)
    world.app.errors = {
        1: [Overloaded("busy", retry_after_s=0.01)] * 20,
        2: [Unavailable("down")] * 4,
        3: [Unavailable("down")] * 5,
        4: [InvalidRequest("bad")],
        5: [FailedEverywhere("it kills")],
    }
    loop = world.loop()
    loop.start()
    batch = await world.ended(await world.submit([line(n) for n in range(20)]))
    await loop.stop()
    assert (batch.status, batch.total, batch.completed, batch.failed) == ("completed", 20, 17, 3)
    failures = await world.results(batch.error_file_id)
    assert {one["custom_id"]: one["response"]["status_code"] for one in failures} == {
        "l3": 503, "l4": 400, "l5": 503,
    }  # fmt: skip
    assert world.app.most <= 8


# A write that is cancelled while its file is being opened leaves the file to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_batch_goes_on_behind_its_last_checkpoint_and_answers_no_line_twice(world, monkeypatch):
    monkeypatch.setattr("actors.batcher._NOTE_EVERY_S", 0.05)
    world.app.delay_s = 0.008  # 2,000 lines take two seconds
    batch_id = await world.submit([line(n) for n in range(2000)])
    for _ in range(4):
        loop = world.loop()
        loop.start()
        await asyncio.sleep(0.3)
        await loop.stop()  # in the middle of whatever it does
        assert 0 < len(set(world.app.answered)) < 2000
    loop = world.loop()
    loop.start()
    batch = await world.ended(batch_id)
    await loop.stop()
    assert (batch.total, batch.completed, batch.failed) == (2000, 2000, 0)
    answers = await world.results(batch.output_file_id)
    assert sorted(one["response"]["body"]["n"] for one in answers) == list(range(2000))
    folder = Path(world.documents._root) / T / "files"
    assert [path.name for path in folder.iterdir() if path.name.startswith("good")] == [], (
        "parts are removed once they are joined"
    )


@pytest.mark.timeout(300)
async def test_a_large_batch_is_run_in_bounded_memory(tmp_path):
    world = World(tmp_path, lease_s=60)  # watched memory makes it slow
    lines = [line(n, body={"n": n, "text": "x" * 500}) for n in range(LINES)]
    batch_id = await world.submit(lines)
    del lines
    tracemalloc.start()
    loop = world.loop(concurrency=32)
    loop.start()
    batch = await world.ended(batch_id, 280)
    await loop.stop()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert batch.completed == LINES
    assert peak < 60e6, f"{peak / 1e6:.0f} MB"  # parts of 4 MB, bytes of the input file, marks of the lines


async def test_a_cancelled_batch_ends_with_what_there_is_and_a_late_one_with_errors(world, monkeypatch):
    monkeypatch.setattr("actors.batcher._NOTE_EVERY_S", 0.05)
    loop = world.loop(concurrency=2)
    loop.start()
    world.app.gate.clear()
    batch_id = await world.submit([line(n) for n in range(10)])
    async with asyncio.timeout(5):
        while not world.app.running:
            await asyncio.sleep(0.01)
    assert (await world.batches.cancel(T, batch_id, 5)).status == "cancelling"
    batch = await world.ended(batch_id)
    assert (batch.status, batch.completed, batch.output_file_id) == ("cancelled", 0, None)
    assert world.app.running == 0
    monkeypatch.setattr("actors.batcher.WINDOW_S", 0.3)
    late = await world.ended(await world.submit([line(n) for n in range(10)]))
    await loop.stop()
    assert (late.status, late.failed) == ("expired", 10)
    errors = await world.results(late.error_file_id)
    assert {one["error"]["code"] for one in errors} == {"batch_expired"}


async def test_another_tenants_batch_does_not_exist(world):
    batch_id = await world.submit([line(0)])
    for call in (world.batches.get("other", batch_id), world.batches.cancel("other", batch_id, 1)):
        with pytest.raises(NotFound):
            await call
    assert await world.batches.page("other", None, 10) == ([], False)
    assert [one.id for one in (await world.batches.page(T, None, 10))[0]] == [batch_id]


async def test_what_makes_a_file_invalid_is_listed_by_line(world):
    loop = world.loop()
    loop.start()
    bad = [line(0), line(0), b"{", line(1, method="GET"), line(2, url="/v1/embeddings"), line(3)]
    batch = await world.ended(await world.submit(bad))
    await loop.stop()
    errors = [(one["line"], one["code"]) for one in json.loads(batch.errors)["data"]]
    assert batch.status == "failed"
    assert errors == [
        (2, "duplicate_custom_id"), (3, "invalid_json_line"), (4, "invalid_method"), (5, "invalid_url"),
    ]  # fmt: skip
    assert world.app.answered == []
    assert await world.jobs.dead_letters(KIND) == []


def test_a_line_needs_an_id_and_a_body():
    with pytest.raises(BadLine, match="custom_id"):
        parse_line(line(1, custom_id=""), ENDPOINT)
    with pytest.raises(BadLine, match="body"):
        parse_line(b'{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions"}', ENDPOINT)
