"""Which tools are called, and with what."""

from __future__ import annotations

import json
from typing import Any

import pytest

from actors.engines.scripted_text import compose
from actors.errors import InvalidRequest
from actors.types import GenerationRequest, Message, Tool, ToolCall, ToolChoice


def number_tool(name: str) -> Tool:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    return Tool(name=name, parameters=schema)


WEATHER = Tool(
    name="get_weather",
    parameters={
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "unit": {"enum": ["celsius", "fahrenheit"]},
            "days": {"type": "integer", "minimum": 1, "maximum": 7},
        },
        "required": ["city"],
    },
)
TOOLS = (number_tool("add"), number_tool("multiply"), WEATHER)


def calls(text: str, choice: ToolChoice | None = None, **fields: Any) -> tuple[ToolCall, ...]:
    request = GenerationRequest(
        request_id="r",
        messages=(Message(role="user", content=text),),
        tools=fields.pop("tools", TOOLS),
        tool_choice=choice or ToolChoice(),
        **fields,
    )
    return compose(request, prompt="", style="echo", choice=0).calls


def arguments(call: ToolCall) -> Any:
    return json.loads(call.arguments)


def test_auto_calls_the_tool_named_in_the_message_with_its_numbers_in_order() -> None:
    (call,) = calls("Please add 17 and -4, using add.")
    assert (call.name, arguments(call)) == ("add", {"a": 17, "b": -4})


def test_auto_answers_in_words_when_no_tool_is_named() -> None:
    assert calls("What is the address of the house?") == ()


def test_a_name_inside_another_word_is_no_call() -> None:
    assert calls("Use get_weather_history or re-add it") == ()


def test_names_and_enums_come_from_the_text() -> None:
    (call,) = calls("Run get_weather for New York in Fahrenheit for 12 or 3 days")
    assert arguments(call) == {"city": "New York", "unit": "fahrenheit", "days": 3}


def test_quoted_text_is_preferred_for_strings() -> None:
    (call,) = calls('Run get_weather for "san francisco" today, said Anna')
    assert arguments(call)["city"] == "san francisco"


def test_several_names_give_several_calls_in_the_order_of_the_text() -> None:
    found = calls("First multiply 2 by 3, then add 4 and 5")
    assert [call.name for call in found] == ["multiply", "add"]
    assert [arguments(call) for call in found] == [{"a": 2, "b": 3}, {"a": 4, "b": 5}]
    assert len({call.id for call in found}) == 2


def test_only_one_call_when_parallel_calls_are_off() -> None:
    assert [call.name for call in calls("multiply 2 3 then add 4 5", parallel_tool_calls=False)] == [
        "multiply"
    ]


def test_a_forced_tool_is_called_whatever_the_text_says() -> None:
    (call,) = calls("multiply 6 by 7", ToolChoice(mode="function", function="add"))
    assert (call.name, arguments(call)) == ("add", {"a": 6, "b": 7})


def test_required_takes_the_named_tool_or_the_first() -> None:
    assert [call.name for call in calls("multiply it", ToolChoice(mode="required"))] == ["multiply"]
    assert [call.name for call in calls("anything", ToolChoice(mode="required"))] == ["add"]


def test_none_never_calls() -> None:
    assert calls("add 1 and 2", ToolChoice(mode="none")) == ()


def test_arguments_are_made_up_where_the_text_has_none() -> None:
    (call,) = calls("just add")
    assert all(isinstance(value, int) for value in arguments(call).values())


def test_a_tool_without_parameters_gets_an_empty_object() -> None:
    (call,) = calls("ping", tools=(Tool(name="ping"),))
    assert call.arguments == "{}"


def test_an_unknown_forced_tool_is_refused_with_the_allowed_names() -> None:
    with pytest.raises(InvalidRequest, match=r"divide.*add, multiply, get_weather") as refused:
        calls("x", ToolChoice(mode="function", function="divide"))
    assert refused.value.param == "tool_choice"


def test_requiring_a_call_without_tools_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="no tool"):
        calls("x", ToolChoice(mode="required"), tools=())


def test_a_tool_that_cannot_be_filled_is_refused_with_its_place() -> None:
    broken = Tool(name="broken", parameters={"type": "object", "properties": {"x": False}, "required": ["x"]})
    with pytest.raises(InvalidRequest, match=r"\$\.x") as refused:
        calls("broken", tools=(*TOOLS, broken))
    assert refused.value.param == "tools[3].function.parameters"


def test_arguments_that_are_no_object_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="must be an object"):
        calls("odd", tools=(Tool(name="odd", parameters={"type": "array"}),))
