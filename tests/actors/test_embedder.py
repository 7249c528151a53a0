"""`Embedder`: batches across callers, questions first, one bad text alone, long texts whole."""

import asyncio
import threading
import time

import numpy as np
import pytest

from actors.embedder import Embedder, EmbedderConfig
from actors.engines.embedding import EmbeddingModelConfig, load_model
from actors.engines.scripted_embedding import ScriptedEmbeddingModel
from actors.errors import EngineFailed, InvalidRequest, Overloaded
from actors.policies.load import LoadSnapshot

POISON = "cyanide"


class Model(ScriptedEmbeddingModel):
    """The scripted model, which notes its batches, may be held, and fails on one word."""

    def __init__(self, window_tokens=32):
        super().__init__(EmbeddingModelConfig(model="scripted", window_tokens=window_tokens))
        self.batches = []
        self.gate = threading.Event()
        self.gate.set()
        self.threads = set()
        self.poison = self.tokenize([POISON], "passage")[0].windows[0][0]

    def embed(self, windows):
        self.threads.add(threading.current_thread().name)
        self.batches.append([len(window) for window in windows])
        assert self.gate.wait(10)
        if any(self.poison in window for window in windows):
            raise RuntimeError("out of memory at 0xdeadbeef")
        return super().embed(windows)


@pytest.fixture
def model():
    return Model()


def embedder_of(model, **config):
    return Embedder(EmbedderConfig(model="scripted", **config), model)


def rows_of(found):
    return np.frombuffer(found.vectors, dtype="<f4").reshape(-1, found.dimensions)


def words(count, name="word"):
    return " ".join(f"{name}{n}" for n in range(count))


async def until(condition):
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


async def test_texts_come_back_in_their_order_whatever_their_length(model):
    texts = [words(20), words(1), words(30), words(5)]
    found = await embedder_of(model, max_batch_tokens=64).embed(texts)
    alone = [await embedder_of(Model()).embed([text]) for text in texts]
    assert rows_of(found) == pytest.approx(np.concatenate([rows_of(one) for one in alone]), abs=1e-6)
    assert found.tokens == 56
    assert found.rows == ()


async def test_callers_of_the_same_moment_share_a_batch_and_the_event_loop_stays_free(model):
    embedder = embedder_of(model)
    await asyncio.gather(*(embedder.embed([words(4, f"w{n}")]) for n in range(10)))
    assert max(len(batch) for batch in model.batches) >= 5
    assert sum(len(batch) for batch in model.batches) == 10
    assert all(name.startswith("embed") for name in model.threads)


async def test_batches_are_bounded_by_padded_tokens_and_sorted_by_length(model):
    embedder = embedder_of(model, max_batch_tokens=64)
    await embedder.embed([words(n) for n in (30, 3, 28, 4, 2, 31)])
    for batch in model.batches:
        assert batch == sorted(batch)
        assert max(batch) * len(batch) <= 64
    assert sum(len(batch) for batch in model.batches) == 6


async def test_a_question_waits_for_the_running_batch_and_not_for_the_ingestion(model):
    embedder = embedder_of(model, max_batch_tokens=32)
    model.gate.clear()
    ingestion = asyncio.create_task(embedder.embed([words(30, f"p{n}") for n in range(50)]))
    await until(lambda: model.batches)
    question = asyncio.create_task(embedder.embed([words(5)], "query"))
    await until(lambda: len(embedder._queue) == 50)  # 49 passages and the question
    model.gate.set()
    await question
    assert [5] in model.batches[:2]
    assert not ingestion.done()
    await ingestion


async def test_a_text_that_breaks_the_model_fails_its_own_call_only(model):
    embedder = embedder_of(model)
    good = [embedder.embed([words(4, f"g{n}")]) for n in range(6)]
    bad = embedder.embed([words(4), POISON])
    results = await asyncio.gather(*good[:3], bad, *good[3:], return_exceptions=True)
    failures = [one for one in results if isinstance(one, Exception)]
    assert len(failures) == 1
    assert isinstance(failures[0], EngineFailed)
    assert "0xdeadbeef" not in failures[0].message
    assert len(rows_of(await embedder.embed(["still alive"]))) == 1


async def test_a_blank_text_is_refused_before_it_reaches_a_batch(model):
    embedder = embedder_of(model)
    with pytest.raises(InvalidRequest) as refused:
        await embedder.embed(["fine", " "])
    assert refused.value.param == "input[1]"
    assert model.batches == []


async def test_a_long_text_is_never_cut_off(model):
    embedder = embedder_of(model)
    long = words(100)
    pooled = await embedder.embed([long, "short"])
    windows = await embedder.embed([long, "short"], pool=False)
    assert windows.rows == (4, 1)
    assert len(rows_of(windows)) == 5
    assert len(rows_of(pooled)) == 2
    assert pooled.tokens == windows.tokens == 101
    assert np.linalg.norm(rows_of(pooled), axis=1) == pytest.approx(np.ones(2), abs=1e-5)
    last = rows_of(await embedder.embed([words(100).split(" ", 90)[-1]], "query"))[0]
    assert max(rows_of(windows)[:4] @ last) > 0.5
    assert rows_of(pooled)[0] @ last > 0.1


async def test_a_caller_who_leaves_takes_its_waiting_texts_along(model):
    embedder = embedder_of(model, max_batch_tokens=32)
    model.gate.clear()
    running = asyncio.create_task(embedder.embed([words(30)]))
    await until(lambda: model.batches)
    leaver = asyncio.create_task(embedder.embed([words(30, f"x{n}") for n in range(20)]))
    await until(lambda: len(embedder._queue) == 20)
    leaver.cancel()
    model.gate.set()
    await running
    await embedder.embed(["after"])
    assert len(model.batches) == 2
    assert embedder._queue.tokens == 0


async def test_other_dimensions_and_too_many_inputs_are_refused_with_what_is_allowed(model):
    embedder = embedder_of(model, max_inputs=3)
    assert (await embedder.embed(["a"], dimensions=256)).dimensions == 256
    with pytest.raises(InvalidRequest, match="256") as refused:
        await embedder.embed(["a"], dimensions=64)
    assert refused.value.param == "dimensions"
    with pytest.raises(InvalidRequest, match="1 to 3"):
        await embedder.embed(["a"] * 4)
    with pytest.raises(InvalidRequest, match="1 to 3"):
        await embedder.embed([])


async def test_a_call_that_would_wait_too_long_is_refused_and_told_when_to_come_back(model):
    embedder = embedder_of(model, max_batch_tokens=32, max_wait_s=0.001)
    await embedder.embed([words(30)])
    embedder._tokens_per_s = 100.0
    model.gate.clear()
    running = asyncio.create_task(embedder.embed([words(30)]))
    await until(lambda: len(model.batches) == 2)
    waiting = asyncio.create_task(embedder.embed([words(30)]))
    await until(lambda: len(embedder._queue) == 1)
    with pytest.raises(Overloaded) as refused:
        await embedder.embed(["late"])
    assert refused.value.retry_after_s == pytest.approx(0.3, rel=0.1)
    question = asyncio.create_task(embedder.embed(["early"], "query"))  # passages do not hold it up
    model.gate.set()
    await asyncio.gather(running, waiting, question)


async def test_its_load_is_what_the_scaling_policy_reads(model):
    embedder = embedder_of(model, max_batch_tokens=32)
    await embedder.embed([words(30)])
    model.gate.clear()
    work = asyncio.create_task(embedder.embed([words(30), words(30), words(30)]))
    await until(lambda: len(embedder._queue) == 2)
    stats = embedder.record_autoscaling_stats()
    load = LoadSnapshot.from_stats(stats)
    assert (load.queued, load.running, stats["queued_tokens"]) == (2, 1, 60)
    assert load.queued_work_s > 0
    model.gate.set()
    await work


async def test_health_is_an_embedding_that_jumps_the_queue(model, monkeypatch):
    embedder = embedder_of(model)
    await embedder.check_health()
    assert model.batches == [[1]]
    monkeypatch.setattr("actors.embedder._HEALTH_TIMEOUT_S", 0.05)
    model.gate.clear()
    with pytest.raises(EngineFailed, match="did not answer"):
        await embedder.check_health()
    model.gate.set()


async def test_it_says_what_model_it_runs():
    info = await Embedder(EmbedderConfig(model="scripted")).info()
    assert (info.model, info.dimensions, info.window_tokens) == ("scripted", 256, 256)


def test_a_model_that_cannot_be_loaded_says_why():
    with pytest.raises(EngineFailed, match="no-such"):
        load_model(EmbeddingModelConfig(model="package:no-such"))
