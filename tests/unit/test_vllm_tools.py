"""How tool choices are honoured on vLLM: what is refused, and what the model is held to."""

import json
from typing import Any

import jsonschema
import pytest

from actors.engines.vllm_tools import calls_schema, plan_tools
from actors.errors import InvalidRequest
from actors.types import GenerationRequest, Message, Tool, ToolChoice

NUMBER = {"type": "integer", "minimum": 0}
ADD = Tool(
    name="add",
    parameters={
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/n"}, "b": {"$ref": "#/properties/a"}},
        "required": ["a", "b"],
        "additionalProperties": False,
        "$defs": {"n": NUMBER},
    },
)
SAY = Tool(name="say", parameters={"properties": {"$ref": {"type": "string"}}, "required": ["$ref"]})


def plan(choice: ToolChoice, tools: tuple[Tool, ...] = (ADD, SAY), parser: Any = None):
    request = GenerationRequest(
        request_id="r", messages=(Message(role="user", content="Hi"),), tools=tools, tool_choice=choice
    )
    return plan_tools(request, parser, llm=None)


def test_a_forced_function_is_held_to_its_own_schema() -> None:
    found = plan(ToolChoice(mode="function", function="add"))
    assert found is not None
    assert found.schema == ADD.parameters


def test_a_function_without_parameters_takes_an_object() -> None:
    found = plan(ToolChoice(mode="function", function="ping"), tools=(Tool(name="ping"),))
    assert found is not None
    assert found.schema == {"type": "object"}


def test_a_forced_function_that_is_not_given_is_refused_with_those_that_are() -> None:
    with pytest.raises(InvalidRequest, match="add, say") as refused:
        plan(ToolChoice(mode="function", function="subtract"))
    assert refused.value.param == "tool_choice"


def test_required_without_tools_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="no tool is given"):
        plan(ToolChoice(mode="required"), tools=())


def test_auto_without_a_parser_is_refused_and_names_the_config_key() -> None:
    with pytest.raises(InvalidRequest, match="`tool_parser`"):
        plan(ToolChoice(mode="auto"))


@pytest.mark.parametrize(("mode", "tools"), [("none", (ADD,)), ("auto", ())])
def test_where_no_call_can_come_there_is_no_plan(mode: Any, tools: tuple[Tool, ...]) -> None:
    assert plan(ToolChoice(mode=mode), tools=tools) is None


def calls(*items: tuple[str, dict]) -> list[dict]:
    return [{"name": name, "parameters": arguments} for name, arguments in items]


@pytest.mark.parametrize(
    ("value", "valid"),
    [
        (calls(("add", {"a": 1, "b": 2})), True),
        (calls(("add", {"a": 1, "b": 2}), ("say", {"$ref": "#x"})), True),
        (calls(("add", {"a": 1, "b": -2})), False),
        (calls(("say", {"a": 1, "b": 2})), False),
        (calls(("subtract", {})), False),
        ([], False),
    ],
)
def test_the_schema_of_required_calls_keeps_each_tools_references(value: list, *, valid: bool) -> None:
    schema = json.loads(json.dumps(calls_schema((ADD, SAY), parallel=True)))
    assert jsonschema.Draft202012Validator(schema).is_valid(value) == valid


def test_without_parallel_calls_one_is_the_most() -> None:
    two = calls(("add", {"a": 1, "b": 2}), ("add", {"a": 3, "b": 4}))
    assert not jsonschema.Draft202012Validator(calls_schema((ADD,), parallel=False)).is_valid(two)
