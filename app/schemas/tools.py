"""Wire models of tools, tool choice and structured output, and what they become in the domain.

`app.schemas.chat` uses them; the engine checks what only a model can know (whether a schema compiles).
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PlainValidator, model_validator

from actors.types import ResponseFormat, Tool, ToolChoice
from app.schemas.bad_input import wrong
from app.schemas.common import BoundedObject, Unsupported, WireModel

MAX_TOOLS = 128
FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


class FunctionSpec(WireModel):
    """A function the model may call; `parameters` is a JSON Schema."""

    name: FunctionName
    description: str | None = None
    parameters: BoundedObject | None = None
    strict: bool | None = None


class ToolSpec(WireModel):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: FunctionSpec

    def to_tool(self) -> Tool:
        """The domain's tool."""
        spec = self.function
        return Tool(
            name=spec.name,
            description=spec.description or "",
            parameters=spec.parameters or {},
            strict=bool(spec.strict),
        )


def tools_of(specs: list[ToolSpec] | None) -> tuple[Tool, ...]:
    """The domain's tools.

    Raises:
        PydanticCustomError: two tools have the same name.
    """
    tools = tuple(spec.to_tool() for spec in specs or ())
    names = [tool.name for tool in tools]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise wrong(f"two tools are named '{name}'", f".tools[{index}].function.name")
    return tools


_MODES = ("none", "auto", "required")


def _tool_choice(value: Any) -> ToolChoice | None:
    if value is None:
        return None
    if value in _MODES:
        return ToolChoice(mode=value)
    function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise wrong(
            "'tool_choice' must be 'none', 'auto', 'required' or "
            '{"type": "function", "function": {"name": "…"}}'
        )
    return ToolChoice(mode="function", function=name)


ToolChoiceField = Annotated[
    ToolChoice | None, PlainValidator(_tool_choice, json_schema_input_type=str | dict[str, Any] | None)
]


def check_choice(choice: ToolChoice | None, tools: tuple[Tool, ...]) -> ToolChoice:
    """The choice that holds; without one it is `auto` when there are tools.

    Raises:
        PydanticCustomError: it asks for a tool that is not there.
    """
    if choice is None:
        return ToolChoice(mode="auto" if tools else "none")
    if choice.mode in {"required", "function"} and not tools:
        raise wrong("'tool_choice' asks for a call and 'tools' is empty", ".tool_choice")
    names = [tool.name for tool in tools]
    if choice.mode == "function" and choice.function not in names:
        raise wrong(
            f"'tool_choice' names a function that is not in 'tools': {', '.join(names)}", ".tool_choice"
        )
    return choice if tools else ToolChoice(mode="none")


class JsonSchemaSpec(WireModel):
    """A named JSON Schema. Output is always valid against it, `strict` or not."""

    name: FunctionName
    schema_: BoundedObject = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormatSpec(WireModel):
    """Text, any JSON object, or JSON of a given schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaSpec | None = None
    unsupported: ClassVar = {"schema": Unsupported('put it in \'json_schema\': {"name", "schema"}')}

    @model_validator(mode="after")
    def _schema_for_its_type(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise wrong(
                "'json_schema' is required for type 'json_schema', and allowed only there", ".json_schema"
            )
        return self

    def to_format(self) -> ResponseFormat:
        """The domain's format."""
        if self.json_schema is None:
            return ResponseFormat(type=self.type)
        return ResponseFormat(type=self.type, schema=self.json_schema.schema_, name=self.json_schema.name)
