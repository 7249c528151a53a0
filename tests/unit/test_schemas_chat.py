from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from app.schemas.bad_input import invalid_request
from app.schemas.chat import ChatRequest

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f"}}


def nested(depth: int) -> dict:
    value: dict = {}
    for _ in range(depth - 1):
        value = {"a": value}
    return value


def schema(value: dict) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": value}}


def parse(**fields) -> ChatRequest:
    return ChatRequest.model_validate_json(json.dumps({"model": "m", "messages": [USER], **fields}))


def refusal(**fields):
    with pytest.raises(ValidationError) as caught:
        parse(**fields)
    return invalid_request(caught.value.errors())


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": None}, "messages", "array"),
        ({"messages": [USER] * 2049}, "messages", "2048"),
        ({"model": ""}, "model", "at least 1"),
        ({"model": 5}, "model", "string"),
        ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
        ({"temperature": "1"}, "temperature", "number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 9}, "n", "less than or equal to 8"),
        ({"n": True}, "n", "integer"),
        ({"stop": ["x"] * 17}, "stop", "16"),
        ({"stop": ["a", ""]}, "stop[1]", "at least 1"),
        ({"seed": 1.5}, "seed", "integer"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_completion_tokens": -1}, "max_completion_tokens", "greater than"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "send one"),
        ({"presence_penalty": 3}, "presence_penalty", "less than or equal to 2"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"top_logprobs": 2}, "top_logprobs", "'logprobs': true"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "'stream': true"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "allowed: include_usage"),
        ({"service_tier": "gold"}, "service_tier", "'auto', 'default', 'flex' or 'priority'"),
        ({"metadata": {"a": 1}}, "metadata.a", "string"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata", "16"),
        ({"modalities": ["text", "audio"]}, "modalities[1]", "'text'"),
        ({"audio": {"voice": "x"}}, "audio", "answers are text"),
        ({"functions": []}, "functions", "use 'tools'"),
        ({"function_call": "auto"}, "function_call", "use 'tool_choice'"),
        ({"logit_bias": {"50256": -100}}, "logit_bias", "not supported"),
        ({"store": True}, "store", "never stored"),
        ({"prediction": {"type": "content"}}, "prediction", "not supported"),
        ({"web_search_options": {}}, "web_search_options", "'retrieval'"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "not supported"),
        ({"top_k": 5}, "top_k", "unknown field 'top_k'; allowed: frequency_penalty, logprobs"),
        ({"tools": [TOOL] * 129}, "tools", "128"),
        ({"tools": [TOOL, TOOL]}, "tools[1].function.name", "two tools are named 'f'"),
        ({"tools": [{"type": "custom"}]}, "tools[0].type", "'function'"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "pattern"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "x": 1}}]},
            "tools[0].function.x",
            "allowed: desc",
        ),
        ({"tools": [TOOL], "tool_choice": "always"}, "tool_choice", "'none', 'auto', 'required'"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice",
            "not in 'tools': f",
        ),
        ({"tool_choice": "required"}, "tool_choice", "'tools' is empty"),
        (
            {"response_format": {"type": "xml"}},
            "response_format.type",
            "'text', 'json_object' or 'json_schema'",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema", "put it in"),
        ({"response_format": schema(nested(33))}, "response_format.json_schema.schema", "32 levels"),
        ({"response_format": schema({"d": "x" * 66_000})}, "response_format.json_schema.schema", "65536"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": nested(33)}}]},
            "tools[0].function.parameters",
            "32 levels",
        ),
        ({"retrieval": {}}, "retrieval.vector_store_ids", "is required"),
        ({"retrieval": {"vector_store_ids": []}}, "retrieval.vector_store_ids", "at least 1"),
        (
            {"retrieval": {"vector_store_ids": ["v"], "max_num_results": 51}},
            "retrieval.max_num_results",
            "50",
        ),
        ({"retrieval": {"vector_store_ids": ["v"], "top_k": 1}}, "retrieval.top_k", "allowed: filters"),
        (
            {
                "retrieval": {
                    "vector_store_ids": ["v"],
                    "ranking_options": {"hybrid_search": {"text_weight": 1}},
                }
            },
            "retrieval.ranking_options.hybrid_search",
            "choose a 'ranker'",
        ),
        ({"retrieval": {"vector_store_ids": ["v"], "filters": nested(40)}}, "retrieval.filters", "32 levels"),
    ],
)
def test_a_bad_field_is_named_with_what_is_allowed(fields, param, words):
    error = refusal(**fields)
    assert error.status_code == 400
    assert error.param == param
    assert words in error.message


@pytest.mark.parametrize(
    ("message", "param", "words"),
    [
        ({"role": "robot", "content": "x"}, "role", "'system', 'developer'"),
        ({"role": "user"}, "content", "needs 'content'"),
        ({"role": "assistant"}, "content", "or 'tool_calls'"),
        ({"role": "tool", "content": "x"}, "tool_call_id", "needs 'tool_call_id'"),
        ({"role": "user", "content": 3}, "content", "string"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "content[0].type", "supported: 'text'"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "content[0].type", "'input_audio' is not supported"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text"}]}, "content[1].text", "string"),
        ({"role": "user", "content": [{"type": "text", "text": "a", "b": 1}]}, "content[0].b", "allowed: type, text"),
        ({"role": "user", "content": ["a"]}, "content[0]", "must be an object"),
        ({"role": "user", "content": "x", "mood": "good"}, "mood", "allowed: content, name, role"),
        ({"role": "assistant", "content": "x", "function_call": {"name": "f"}}, "function_call", "use 'tool_calls'"),
        ({"role": "user", "content": "x", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{}"}}]},
         "tool_calls", "only a message of role 'assistant'"),
        ({"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": {}}}]},
         "tool_calls[0].function.arguments", "string"),
    ],
)  # fmt: skip
def test_a_bad_message_is_named_by_its_path(message, param, words):
    error = refusal(messages=[USER, message])
    assert error.param == f"messages[1].{param}"
    assert words in error.message


def test_what_sdks_send_and_ask_nothing_with_is_accepted():
    parse(
        logit_bias={}, store=False, modalities=["text"], prompt_cache_key="k", safety_identifier="u", user="u",
        audio=None, functions=None, stop=None, temperature=None, stream=None, tools=None, tool_choice=None,
        unheard_of=None, parallel_tool_calls=True, tool_call_id=None, reasoning_effort="none",
    )  # fmt: skip


def test_an_answers_message_is_accepted_as_history():
    answer = {
        "role": "assistant", "content": "hi", "refusal": None, "annotations": [], "audio": None, "function_call": None,
        "tool_calls": None, "reasoning_content": "…",
    }  # fmt: skip
    assert len(parse(messages=[USER, answer, USER]).messages) == 3


def test_a_single_stop_is_a_list_of_one():
    assert parse(stop="END").stop == ("END",)


def test_nan_in_a_schema_is_refused():
    error = refusal(retrieval={"vector_store_ids": ["v"], "filters": {"a": float("nan")}})
    assert "NaN" in error.message


@pytest.mark.parametrize(("tier", "rank"), [("priority", 0), ("flex", 2), ("auto", None), ("default", None)])
def test_a_service_tier_is_a_priority_class_or_the_keys_own(tier, rank):
    priority = parse(service_tier=tier).priority()
    assert (None if priority is None else priority.rank) == rank


def test_no_tools_means_no_tool_is_called():
    call = parse().to_call(timeout_s=None, request_id="r")
    assert (call.request.tools, call.request.tool_choice.mode) == ((), "none")


def test_a_schema_at_the_bounds_is_accepted():
    request = parse(response_format=schema(nested(32))).to_call(timeout_s=None, request_id="r").request
    assert request.response_format.schema == nested(32)
