"""Which tools the scripted engine calls, and with what.

Called by `scripted_text`. A tool is called because it is forced, required, or because its name stands in the
last user message; its arguments come from `scripted_schema`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence

from actors.engines.scripted_material import Material
from actors.engines.scripted_schema import instance
from actors.errors import InvalidRequest
from actors.types import GenerationRequest, Tool, ToolCall


def choose_calls(request: GenerationRequest, asked: str, choice: int) -> tuple[ToolCall, ...]:
    """The calls of one choice; none means that it answers in words.

    Raises:
        InvalidRequest: the forced tool does not exist, none is there to be required, or the arguments of one
            cannot be filled.
    """
    tools = _wanted(request, asked)
    if not tools:
        return ()
    if not request.parallel_tool_calls:
        tools = tools[:1]
    material = Material(asked, without=[tool.name for tool in request.tools])
    return tuple(
        ToolCall(
            id=_call_id(request.request_id, choice, number),
            name=tool.name,
            arguments=_arguments(tool, material, place=request.tools.index(tool)),
        )
        for number, tool in enumerate(tools)
    )


def _wanted(request: GenerationRequest, asked: str) -> Sequence[Tool]:
    mode, forced = request.tool_choice.mode, request.tool_choice.function
    if mode == "function":
        found = [tool for tool in request.tools if tool.name == forced]
        if not found:
            names = ", ".join(tool.name for tool in request.tools) or "none"
            raise InvalidRequest(f"there is no tool {forced!r}; the tools are: {names}", param="tool_choice")
        return found[:1]
    if mode == "required":
        if not request.tools:
            raise InvalidRequest("a tool call is required and no tool is given", param="tool_choice")
        return _named(request.tools, asked) or request.tools[:1]
    answered = bool(request.messages) and request.messages is not None and request.messages[-1].role == "tool"
    return [] if mode == "none" or answered else _named(request.tools, asked)


def _named(tools: Sequence[Tool], asked: str) -> list[Tool]:
    """The tools whose name stands in the text, in the text's order."""
    found = [(re.search(rf"(?<![\w-]){re.escape(tool.name)}(?![\w-])", asked), tool) for tool in tools]
    return [tool for at, tool in sorted(((m.start(), t) for m, t in found if m), key=lambda pair: pair[0])]


def _arguments(tool: Tool, material: Material, place: int) -> str:
    param = f"tools[{place}].function.parameters"
    schema = tool.parameters or {"type": "object"}
    value = instance(schema, material, param=param)
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"the arguments of {tool.name} must be an object", param=param)
    return json.dumps(value, ensure_ascii=False)


def _call_id(request_id: str, choice: int, number: int) -> str:
    return "call_" + hashlib.sha256(f"{request_id}:{choice}:{number}".encode()).hexdigest()[:24]
