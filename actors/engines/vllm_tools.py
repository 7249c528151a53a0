"""Tool calls on vLLM: what the model is constrained to, and how its text becomes `ToolCallDelta` pieces.

`VllmEngine.generate` asks `plan_tools` once per request; `vllm_output` feeds every choice's text to a stream of
the plan. A forced or required call needs no parser: the grammar leaves the model nothing else to write. In auto
mode the model decides, in its own format, and vLLM's parser for that format reads it (`tool_parser`).
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from actors.engines.vllm_prompt import as_openai
from actors.errors import InvalidRequest
from actors.types import GenerationRequest, Tool, ToolCallDelta

Pieces = tuple[str, tuple[ToolCallDelta, ...]]  # text for the reader, and what it adds to tool calls


class ToolStream(Protocol):
    """Reads one choice's text as it comes."""

    def push(self, text: str, token_ids: Sequence[int], *, finished: bool) -> Pieces:
        """Take what one step added; `finished` with the last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolPlan:
    """How one request's tool calls come about."""

    new_stream: Callable[[], ToolStream]  # one per choice
    schema: Mapping[str, Any] | None = None  # what the whole text must be; None: free text
    special_tokens: bool = False  # the parser reads special tokens: they must stay in the text


def plan_tools(request: GenerationRequest, parser: Any, llm: Any) -> ToolPlan | None:
    """Decide how to honour `tools` and `tool_choice`; None: no call can come.

    Args:
        request: the request.
        parser: vLLM's parser class for auto mode, or None.
        llm: the `AsyncLLM`; used in auto mode only.

    Raises:
        InvalidRequest: the choice cannot be honoured.
    """
    mode = request.tool_choice.mode
    if mode == "function":
        tool = _forced(request)
        return ToolPlan(schema=_parameters(tool), new_stream=lambda: ForcedCall(tool.name))
    if mode == "required":
        if not request.tools:
            raise InvalidRequest("a tool call is required and no tool is given", param="tool_choice")
        return ToolPlan(
            schema=calls_schema(request.tools, parallel=request.parallel_tool_calls), new_stream=RequiredCalls
        )
    if mode == "none" or not request.tools:
        return None
    if parser is None:
        raise InvalidRequest(
            "tool_choice auto needs `tool_parser` in the config of this model's engine; without it, "
            "tool_choice can be none, required or one function",
            param="tool_choice",
        )
    return _auto(request, parser, llm)


def calls_schema(tools: Sequence[Tool], *, parallel: bool) -> dict[str, Any]:
    """JSON Schema of a list of calls of these tools, in the form that vLLM's reader of it expects.

    Each tool's schema moves to the root's `$defs`, and its references with it, so that they still resolve.
    """
    definitions = {f"tool{i}": _moved(_parameters(tool), f"#/$defs/tool{i}") for i, tool in enumerate(tools)}
    one_call = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.name}, "parameters": {"$ref": f"#/$defs/tool{i}"}},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for i, tool in enumerate(tools)
    ]
    most = {} if parallel else {"maxItems": 1}
    return {"type": "array", "minItems": 1, **most, "items": {"anyOf": one_call}, "$defs": definitions}


class ForcedCall:
    """The whole text is the arguments of one named function."""

    def __init__(self, name: str) -> None:
        self._name: str | None = name

    def push(self, text: str, token_ids: Sequence[int], *, finished: bool) -> Pieces:  # noqa: ARG002  Protocol
        """See `ToolStream`."""
        if self._name is not None:
            piece = ToolCallDelta(index=0, id=_call_id(), name=self._name, arguments=text)
            self._name = None
            return "", (piece,)
        return "", (ToolCallDelta(index=0, arguments=text),) if text else ()


class RequiredCalls:
    """The whole text is a JSON list of `{"name": ..., "parameters": ...}`."""

    def __init__(self) -> None:
        self._text = ""

    def push(self, text: str, token_ids: Sequence[int], *, finished: bool) -> Pieces:  # noqa: ARG002  Protocol
        """See `ToolStream`."""
        from vllm.tool_parsers.streaming import extract_required_tool_call_streaming

        before, self._text = self._text, self._text + text
        message, _ = extract_required_tool_call_streaming(
            previous_text=before, current_text=self._text, tool_call_idx=None, tool_call_id_type="random"
        )
        return "", _pieces(message, parallel=True)


class ParsedCalls:
    """Free text that may hold calls in the model's own format.

    Args:
        parser: an instance of vLLM's parser, for one choice.
        request: the request as vLLM's parsers want to see it.
        parallel: whether more than one call may come.
    """

    def __init__(self, parser: Any, request: Any, *, parallel: bool) -> None:
        self._parser, self._request, self._parallel = parser, request, parallel

    def push(self, text: str, token_ids: Sequence[int], *, finished: bool) -> Pieces:
        """See `ToolStream`."""
        # An empty list of prompt ids tells the parser that no reasoning is open.
        message = self._parser.parse_delta(text, list(token_ids), self._request, [], finished=finished)
        content = (message.content or "") if message is not None else ""
        return content, _pieces(message, parallel=self._parallel)


def _auto(request: GenerationRequest, parser: Any, llm: Any) -> ToolPlan:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    as_vllm = ChatCompletionRequest(
        model="",
        messages=[{"role": "user", "content": ""}],  # the prompt is rendered already; parsers read the tools
        tools=[as_openai(tool) for tool in request.tools],
        tool_choice="auto",
    )

    def new_parser() -> Any:
        return parser(llm.get_tokenizer(), as_vllm.tools, model_config=llm.model_config)

    as_vllm = new_parser().tool_parser.adjust_request(as_vllm)
    return ToolPlan(
        new_stream=lambda: ParsedCalls(new_parser(), as_vllm, parallel=request.parallel_tool_calls),
        special_tokens=not as_vllm.skip_special_tokens,
    )


def _forced(request: GenerationRequest) -> Tool:
    for tool in request.tools:
        if tool.name == request.tool_choice.function:
            return tool
    names = ", ".join(tool.name for tool in request.tools) or "none"
    raise InvalidRequest(
        f"there is no tool {request.tool_choice.function!r}; the tools are: {names}", param="tool_choice"
    )


def _parameters(tool: Tool) -> dict[str, Any]:
    return {"type": "object", **tool.parameters}


def _moved(value: Any, root: str) -> Any:
    """The schema with its local references (`#...`) pointing below its new root."""
    if isinstance(value, Mapping):
        return {
            key: root + item.removeprefix("#") if _is_local_reference(key, item) else _moved(item, root)
            for key, item in value.items()
        }
    return [_moved(item, root) for item in value] if isinstance(value, list | tuple) else value


def _is_local_reference(key: str, value: Any) -> bool:
    return key == "$ref" and isinstance(value, str) and value.startswith("#")


def _pieces(message: Any, *, parallel: bool) -> tuple[ToolCallDelta, ...]:
    """Take over vLLM's DeltaMessage; without `parallel`, calls after the first are dropped."""
    if message is None:
        return ()
    return tuple(
        ToolCallDelta(
            index=call.index,
            id=_call_id() if call.id else None,
            name=call.function.name if call.function else None,
            arguments=(call.function.arguments or "") if call.function else "",
        )
        for call in message.tool_calls or ()
        if parallel or call.index == 0
    )


def _call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"
