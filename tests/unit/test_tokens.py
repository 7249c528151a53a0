"""Counting tokens for tickets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from actors.engines.tokens import EstimatedCounter, FileCounter, counter_for, prompt_tokens
from actors.types import GenerationRequest, Message, ModelCard, Tool, ToolCall


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A folder with a real, tiny tokenizer.json: one token per word."""
    tokenizer = Tokenizer(WordLevel({"?": 0, "hello": 1}, "?"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.enable_truncation(4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_a_tokenizer_file_counts_its_own_tokens_and_never_truncates(model_dir: Path) -> None:
    counter = counter_for(str(model_dir))
    assert isinstance(counter, FileCounter)
    assert counter.count("hello big wide world and all who live there") == 9


def test_lone_surrogates_do_not_break_a_real_tokenizer(model_dir: Path) -> None:
    assert counter_for(str(model_dir)).count("hello \ud83d") == 2


def test_a_missing_file_gives_an_estimate_until_it_is_there(tmp_path: Path, model_dir: Path) -> None:
    folder = tmp_path / "later"
    assert isinstance(counter_for(str(folder)), EstimatedCounter)
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((model_dir / "tokenizer.json").read_bytes())
    assert isinstance(counter_for(str(folder)), FileCounter)


def test_a_broken_file_gives_an_estimate(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    assert isinstance(counter_for(str(tmp_path)), EstimatedCounter)


def test_the_estimate_is_bytes_by_three_and_a_half_rounded_up() -> None:
    counter = EstimatedCounter()
    assert [counter.count(text) for text in ("", "a", "1234567", "12345678", "éé", "\ud83d")] == [
        0,
        1,
        2,
        3,
        2,
        1,
    ]


def card(overhead: int = 4) -> ModelCard:
    return ModelCard(name="m", context_tokens=100, tokenizer="scripted", template_overhead_tokens=overhead)


def test_a_prompt_is_its_messages_and_the_template_around_each() -> None:
    messages = (Message(role="system", content="Be nice"), Message(role="user", content="Hello"))
    request = GenerationRequest(request_id="r", messages=messages)
    assert prompt_tokens(card(0), request) == 3 + 2
    assert prompt_tokens(card(4), request) == 3 + 2 + 2 * 4


def test_names_and_tool_calls_of_the_history_count() -> None:
    bare = GenerationRequest(request_id="r", messages=(Message(role="assistant", content="Hm"),))
    call = ToolCall(id="c", name="add", arguments='{"a": 1}')
    full = GenerationRequest(
        request_id="r", messages=(Message(role="assistant", content="Hm", name="bob", tool_calls=(call,)),)
    )
    assert prompt_tokens(card(), full) > prompt_tokens(card(), bare)


def test_tool_schemas_count() -> None:
    tool = Tool(name="add", description="Adds.", parameters={"type": "object", "properties": {"a": {}}})
    messages = (Message(role="user", content="Hi"),)
    without = prompt_tokens(card(), GenerationRequest(request_id="r", messages=messages))
    tools = prompt_tokens(card(), GenerationRequest(request_id="r", messages=messages, tools=(tool,)))
    assert tools - without >= len(json.dumps(dict(tool.parameters))) / 4


def test_a_plain_prompt_and_token_ids_have_no_template() -> None:
    assert prompt_tokens(card(), GenerationRequest(request_id="r", prompt="Once upon")) == 3
    assert prompt_tokens(card(), GenerationRequest(request_id="r", prompt_token_ids=(1, 2, 3))) == 3
