"""Block hashes of prompts, and what replicas are known to have read."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.handles import frames
from actors.policies.prefix import KnownPrefixes, prefix_blocks, prefix_of
from actors.types import GenerationRequest, Message, Principal, Ticket, Tool


def test_equal_beginnings_have_equal_blocks_and_nothing_else_has():
    common = "x" * 1024
    one, two = prefix_blocks(common + "a" * 600, "s"), prefix_blocks(common + "b" * 600, "s")
    assert one[:2] == two[:2]
    assert not set(one[2:]) & set(two[2:])


def test_a_block_stands_for_all_that_is_before_it():
    assert prefix_blocks("a" * 512 + "c" * 512, "s")[1] != prefix_blocks("b" * 512 + "c" * 512, "s")[1]


def test_tenants_share_no_block():
    assert not set(prefix_blocks("p" * 2000, "one")) & set(prefix_blocks("p" * 2000, "two"))


@pytest.mark.parametrize("prompt", ["p" * 1_000_000, list(range(1_000_000))])
def test_there_are_at_most_64_blocks(prompt):
    assert len(prefix_blocks(prompt, "s")) == 64


@pytest.mark.parametrize("prompt", ["", "\ud800 lone", [0, -1, 10**30]])
def test_any_prompt_has_blocks(prompt):
    assert len(prefix_blocks(prompt, "s")) == (1 if prompt else 0)


def conversation(*contents, tools=()):
    messages = tuple(
        Message(role="user" if n % 2 == 0 else "assistant", content=text) for n, text in enumerate(contents)
    )
    return GenerationRequest(request_id="r", messages=messages, tools=tools, cache_salt="s")


def test_the_next_turn_of_a_conversation_begins_with_the_last_one():
    one = prefix_of(conversation("a" * 3000))
    two = prefix_of(conversation("a" * 3000, "b" * 3000, "c"))
    assert two[: len(one) - 1] == one[:-1]
    assert len(two) > len(one)


def test_roles_tools_and_token_ids_are_part_of_the_prompt():
    plain = prefix_of(conversation("hello"))
    assert plain != prefix_of(conversation("hello", tools=(Tool(name="f"),)))
    system = GenerationRequest(
        request_id="r", messages=(Message(role="system", content="hello"),), cache_salt="s"
    )
    assert plain != prefix_of(system)
    ids = GenerationRequest(request_id="r", prompt_token_ids=(1, 2, 3), cache_salt="s")
    assert prefix_of(ids) == prefix_blocks([1, 2, 3], "s")


def test_hashes_travel_in_a_ticket():
    ticket = Ticket(
        request_id="r",
        principal=Principal(tenant="t"),
        prompt_tokens=1,
        predicted_output_tokens=1,
        timeout_s=1.0,
        prefix=(2**64 - 1, 0),
    )
    [command] = frames.decode_queue_commands(frames.encode([frames.Submit(ticket)]))
    assert command.ticket.prefix == (2**64 - 1, 0)


def test_a_replica_knows_the_beginning_of_what_it_has_read():
    known = KnownPrefixes(10_000)
    known.add((1, 2, 3))
    assert [known.matched(p) for p in [(1, 2, 3, 4), (1, 2, 9), (9, 2, 3), ()]] == [3, 2, 0, 0]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000))
def test_what_is_kept_is_bounded_and_always_the_beginning_of_a_prompt(seed):
    chance = random.Random(seed)
    known = KnownPrefixes(20 * 128)
    prompts = [tuple(10 * branch + n for n in range(3)) + tuple(range(100 * t, 100 * t + 8))
               for t, branch in enumerate([0, 0, 0, 1, 1, 2], start=1)]  # fmt: skip
    for _ in range(60):
        known.add(chance.choice(prompts))
        assert len(known._blocks) <= 20
        for prompt in prompts:
            kept = [block in known._blocks for block in prompt]
            assert kept == sorted(kept, reverse=True)
            assert known.matched(prompt) == sum(kept)
