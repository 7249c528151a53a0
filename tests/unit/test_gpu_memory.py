"""Bytes of a card: leases, KV caches, who sleeps, and what becomes of engines that die."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from actors.engines.choice import EngineChoice, sized
from actors.engines.gpu_start import Plan
from actors.errors import EngineFailed
from actors.policies.containment import Quarantine, Restart, after_death
from actors.policies.gpu_memory import (
    Card,
    Footprint,
    Lease,
    budget_bytes,
    kv_cache_bytes,
    missing_bytes,
    require_room,
    sleepers,
    within,
)

CARD = Card(uuid="c", total_bytes=1000, reserve_bytes=100)


def lease(owner: str, size: int, **more) -> Lease:
    return Lease(owner=owner, card="c", size_bytes=size, **more)


def test_a_fraction_is_of_what_the_reserve_leaves():
    assert budget_bytes(0.25, CARD) == 225


@pytest.mark.parametrize("share", [0, -1, 1.5, 2])
def test_a_share_is_of_one_card(share):
    with pytest.raises(EngineFailed, match="at most 1"):
        budget_bytes(share, CARD)


@given(st.lists(st.integers(1, 900), max_size=8))
def test_granted_leases_never_exceed_the_card(sizes):
    granted: list[Lease] = []
    for number, size in enumerate(sizes):
        try:
            require_room(CARD, granted, size, str(number))
        except EngineFailed:
            continue
        granted.append(lease(str(number), size))
    assert sum(each.held_bytes for each in granted) <= CARD.usable_bytes


def test_leases_of_other_cards_and_ones_own_do_not_count():
    others = [Lease(owner="a", card="d", size_bytes=900), lease("me", 900)]
    require_room(CARD, others, 900, "me")


def test_a_sleeper_holds_only_what_it_keeps():
    asleep = lease("a", 800, asleep_bytes=50, state="asleep")
    require_room(CARD, [asleep], 850, "b")
    with pytest.raises(EngineFailed, match="left to lease"):
        require_room(CARD, [asleep], 851, "b")


def test_the_kv_cache_is_the_rest_of_the_budget_or_the_model_is_refused():
    assert kv_cache_bytes(500, Footprint(size_bytes=300), 100) == 200
    with pytest.raises(EngineFailed, match="raise num_gpus"):
        kv_cache_bytes(399, Footprint(size_bytes=300), 100)


def test_less_than_the_lease_is_as_suspect_as_more():
    assert [within(1000, used, 0.02) for used in (979, 980, 1020, 1021)] == [False, True, True, False]


@given(
    st.lists(st.tuples(st.integers(1, 400), st.one_of(st.none(), st.floats(0, 100))), max_size=6),
    st.integers(1, 900),
)
def test_who_is_asked_to_sleep_makes_room_and_nobody_is_asked_in_vain(neighbours, wanted):
    leases = [lease(str(n), size, idle_since=idle) for n, (size, idle) in enumerate(neighbours)]
    chosen = sleepers(CARD, leases, wanted, "me")
    missing = missing_bytes(CARD, leases, wanted, "me")
    assert all(each.idle_since is not None for each in chosen)
    if chosen:
        assert sum(each.size_bytes for each in chosen) >= missing
        assert sum(each.size_bytes for each in chosen[:-1]) < missing
    else:
        idle = sum(each.size_bytes for each in leases if each.idle_since is not None)
        assert missing == 0 or idle < missing


def test_those_idle_for_longest_sleep_first():
    leases = [lease("new", 300, idle_since=9.0), lease("old", 300, idle_since=1.0), lease("busy", 300)]
    assert [each.owner for each in sleepers(CARD, leases, 300, "me")] == ["old"]


def test_deaths_are_forgotten_after_ten_minutes():
    assert after_death([0], 0) == Restart(after_s=1, batch_share=1)
    assert after_death([0, 100], 100) == Restart(after_s=2, batch_share=0.5)
    assert after_death([0, 100, 200], 200) == Quarantine()
    assert after_death([0, 100, 701], 701) == Restart(after_s=1, batch_share=1)


# --- the config ------------------------------------------------------------------------------------------------

VLLM = {"model": "/models/m", "max_num_seqs": 8}


@pytest.mark.parametrize(
    ("choice", "why"),
    [
        ({"scripted": {}, "share": {}}, "goes with vllm"),
        ({"vllm": VLLM | {"kv_cache_memory_bytes": 1 << 30}, "share": {}}, "follows from num_gpus"),
        ({"vllm": VLLM | {"gpu_memory_utilization": 0.5}, "share": {}}, "follows from num_gpus"),
        ({"vllm": {"model": "/models/m"}, "share": {}}, "needs vllm.max_num_seqs"),
        ({"vllm": VLLM | {"tensor_parallel_size": 2}, "share": {}}, "of one GPU"),
        ({"vllm": VLLM, "share": {"size": 1}}, "size"),
    ],
)
def test_a_share_that_cannot_hold_is_refused_with_its_reason(choice, why):
    with pytest.raises(ValidationError, match=why):
        EngineChoice.model_validate(choice)


def test_a_sized_engine_profiles_nothing():
    vllm = EngineChoice.model_validate({"vllm": VLLM, "share": {}}).vllm
    assert vllm is not None
    config = sized(vllm, Plan(kv_cache_bytes=1 << 30, batch_share=0.5))
    assert (config.kv_cache_memory_bytes, config.max_num_seqs) == (1 << 30, 4)
    assert config.engine_args == {"enable_sleep_mode": True}
