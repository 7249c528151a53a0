"""Engines on shares of a card: the same suite on a card in a file and, with `-m gpu`, on a real one.

All engines of a test live in this process, so each is held to its lease by what the whole card gained by its start.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from pathlib import Path

import pytest

from actors.engines.gpu_ledger import GpuLedger
from actors.errors import EngineFailed, Unavailable
from actors.policies.gpu_memory import MIB, Lease
from actors.types import GenerationRequest, Message
from tests.gpu.conftest import WEIGHTS_BYTES
from tests.gpu.starters import start_in_rounds


def request(number: int, words: int = 20) -> GenerationRequest:
    text = " ".join(f"{n:03}" for n in range(words))
    return GenerationRequest(request_id=str(number), messages=(Message(role="user", content=text),))


async def tokens(engine, number: int, words: int = 20) -> int:
    return sum([len(delta.token_ids) async for delta in engine.generate(request(number, words))])


@pytest.fixture(autouse=True)
def whole_card(memory, monkeypatch):
    """One process holds several engines here, so nobody can be told apart by pid."""
    monkeypatch.setattr(memory, "used_by", lambda card, pids: None)


async def test_the_kv_cache_is_what_the_share_leaves(make, memory):
    card = memory.mine()
    engine = make("a", 0.24)
    await engine.start()
    lease = int(0.24 * card.usable_bytes)
    planned = engine.made[-1]._parts["kv"]
    assert abs(planned - (lease - WEIGHTS_BYTES)) <= 0.01 * lease
    assert abs(memory.used_bytes(card) - lease) <= 0.02 * lease + 512 * MIB  # and the process's context


async def test_what_it_takes_is_measured_once(make):
    first = make("a", 0.2)
    await first.start()
    assert len(first.made) == 2  # one to measure, one to serve
    await first.stop()
    again = make("a", 0.3)
    await again.start()
    assert len(again.made) == 1


async def test_leases_never_exceed_the_card(make):
    for name in ("a", "b"):
        await make(name, 0.4).start()
    with pytest.raises(EngineFailed, match="left to lease"):
        await make("c", 0.4).start()
    await make("d", 0.2).start()


async def test_a_model_that_does_not_fit_its_share_is_refused_with_what_it_needs(make, memory):
    engine = make("a", 0.02, weights_bytes=4 << 30)
    with pytest.raises(EngineFailed, match="raise num_gpus"):
        await engine.start()
    assert GpuLedger(engine._config.folder).leases() == []


async def test_an_engine_that_takes_more_than_its_lease_does_not_become_ready(make, memory):
    engine = make("a", 0.2)
    await engine.start()
    await engine.stop()
    fat = make("a", 0.2)
    make_engine = fat._starter._make

    def fatter(plan):
        engine = make_engine(plan)
        engine._parts["leak"] = 1 << 30
        return engine

    fat._starter._make = fatter
    with pytest.raises(EngineFailed, match="its lease is"):
        await fat.start()
    assert GpuLedger(fat._config.folder).leases() == []
    await make("a", 0.2).start()  # measured again, and well


# --- asleep ---------------------------------------------------------------------------------------------------


async def test_more_models_than_fit_share_a_card_by_sleeping(make):
    engines = [make(name, 0.6) for name in ("a", "b")]
    await engines[0].start()
    # The second one cannot even start while the first one holds its bytes.
    with pytest.raises(EngineFailed, match="left to lease"):
        await engines[1].start()
    ledger = GpuLedger(engines[0]._config.folder)
    card = engines[0]._cards.mine()
    assert ledger.ask_to_sleep(card, int(0.6 * card.usable_bytes), "b")
    await until(lambda: engines[0].asleep)
    await engines[1].start()
    for turn in range(3):
        for engine, other in (engines, engines[::-1]):
            assert await tokens(engine, turn) == 20
            assert not engine.asleep
            assert other.asleep


async def test_an_engine_at_work_is_not_put_to_sleep(make):
    busy, other = make("a", 0.6), make("b", 0.6, wake_timeout_s=0.05)
    await busy.start()
    ledger = GpuLedger(busy._config.folder)
    card = busy._cards.mine()
    ledger.ask_to_sleep(card, int(0.6 * card.usable_bytes), "b")
    await until(lambda: busy.asleep)
    await other.start()
    await tokens(busy, 1)
    long = asyncio.create_task(tokens(busy, 2, words=400))
    await until(lambda: busy._lease.idle_since is None)
    with pytest.raises(Unavailable, match="at work"):
        await tokens(other, 3)
    assert await long == 400
    other._config = busy._config
    assert await tokens(other, 4) == 20


async def test_waking_takes_less_than_a_second(make):
    first, second = make("a", 0.6), make("b", 0.6)
    await first.start()
    card = first._cards.mine()
    GpuLedger(first._config.folder).ask_to_sleep(card, int(0.6 * card.usable_bytes), "b")
    await until(lambda: first.asleep)
    await second.start()
    began = time.monotonic()
    await tokens(first, 1, words=2)
    assert time.monotonic() - began < 1.0


# --- an engine that runs out of memory ----------------------------------------------------------------------------


async def test_an_engine_that_dies_comes_back_smaller_and_then_not_at_all(make, monkeypatch):
    monkeypatch.setattr("actors.policies.containment._FIRST_BACKOFF_S", 0.01)
    engine, neighbour = make("a", 0.4), make("b", 0.4)
    await engine.start()
    await neighbour.start()
    sequences = []
    for death in range(3):
        running = asyncio.create_task(tokens(neighbour, death, words=100))
        sequences.append(engine.capacity.max_sequences)
        engine.made[-1].run_out_of_memory()
        with pytest.raises(EngineFailed):
            await tokens(engine, death)
        assert await engine.recover() is (death < 2)
        assert await running == 100
    assert sequences == [64, 64, 32]
    assert engine.quarantined
    assert [lease.owner for lease in GpuLedger(engine._config.folder).leases()] == ["b"]


# --- started together -----------------------------------------------------------------------------------------


@pytest.mark.timeout(120)
def test_four_quarters_started_together_are_all_ready_in_every_round(memory, tmp_path, request):
    real = "real" in request.node.name
    rounds = 10 if real else 12  # tests.benchmarks.gpu has 100
    told = start_in_rounds(tmp_path, rounds=rounds, shares=4, num_gpus=0.24, real=real)
    assert [t for t in told if not t.ready] == []
    assert len(told) == 4 * rounds
    assert max(t.kv_error for t in told) <= 0.01


def test_a_lease_ends_with_the_process_that_took_it(memory, tmp_path):
    card = memory.mine()
    process = multiprocessing.get_context("spawn").Process(target=_take_and_die, args=(tmp_path, card))
    process.start()
    process.join(30)
    assert process.exitcode == 0
    assert GpuLedger(tmp_path).leases() == []


def _take_and_die(folder: Path, card) -> None:
    GpuLedger(folder).take(Lease(owner="gone", card=card.uuid, size_bytes=card.usable_bytes), card)
    assert [lease.owner for lease in GpuLedger(folder).leases()] == ["gone"]


async def until(holds, timeout_s: float = 5) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
