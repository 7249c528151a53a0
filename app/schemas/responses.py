"""The request of `POST /v1/responses`: OpenAI's wire shape, checked, and the `GenerationCall` it becomes.

`app.api.responses` calls it. Input items become messages; the one tool is `file_search`. What an answer looks like
is `app.schemas.response_events`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from actors.types import (
    GenerationCall,
    GenerationRequest,
    Message,
    PriorityClass,
    ResponseFormat,
    RetrievalOptions,
    SamplingParams,
)
from app.schemas.bad_input import shown, wrong
from app.schemas.chat import MAX_MESSAGES, RetrievalSpec
from app.schemas.common import BoundedObject, ModelName, Unsupported, WireModel
from app.schemas.generation import Metadata, StreamOptions
from app.schemas.tools import FunctionName

_ROLES = ("user", "assistant", "system", "developer")
_PART_TEXT = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
_PART_KEYS = frozenset({"type", "text", "refusal", "annotations", "logprobs", "prompt_cache_breakpoint"})
_MESSAGE_KEYS = frozenset({"type", "role", "content", "id", "status", "phase"})
_INCLUDABLE = ("file_search_call.results",)
_TIERS: dict[str, PriorityClass | None] = {
    "auto": None,
    "default": PriorityClass.INTERACTIVE,  # the key's own: a tier never raises it
    "priority": PriorityClass.INTERACTIVE,
    "flex": PriorityClass.BATCH,
}

# --- input -------------------------------------------------------------------------------------------


def _input(value: Any) -> tuple[Message, ...]:
    """A text, or a list of items."""
    if isinstance(value, str):
        if not value:
            raise wrong("an empty text is not allowed")
        return (Message(role="user", content=value),)
    if not isinstance(value, list) or not value:
        raise wrong("must be a text or a list of input items that is not empty")
    if len(value) > MAX_MESSAGES:
        raise wrong(f"{len(value)} items, at most {MAX_MESSAGES} allowed")
    messages = [_message(item, f"[{index}]") for index, item in enumerate(value)]
    found = tuple(message for message in messages if message is not None)
    if not found:
        raise wrong("there is no message among the input items")
    return found


def _message(item: Any, key: str) -> Message | None:
    if not isinstance(item, dict):
        raise wrong('an input item must be an object like {"role": "user", "content": "…"}', key)
    kind = item.get("type", "message")
    if kind == "file_search_call":
        return None  # an earlier answer's search, sent back with it: its text is all that the model is shown
    if kind != "message":
        raise wrong(
            f"input items of type '{shown(kind)}' are not supported; supported: message, file_search_call",
            f"{key}.type",
        )
    unknown = next((name for name in item if name not in _MESSAGE_KEYS), None)
    if unknown is not None:
        raise wrong(
            f"unknown field '{shown(unknown)}'; allowed: type, role, content", f"{key}.{shown(unknown)}"
        )
    role = item.get("role")
    if role not in _ROLES:
        raise wrong(f"'role' must be one of {', '.join(_ROLES)}", f"{key}.role")
    # `developer` is the newer name of `system`, as in chat.
    return Message(role="system" if role == "developer" else role, content=_text(item.get("content"), key))


def _text(content: Any, key: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise wrong("'content' must be a text or a list of content parts", f"{key}.content")
    return "\n".join(_part(part, f"{key}.content[{index}]") for index, part in enumerate(content))


def _part(part: Any, key: str) -> str:
    text_key = _PART_TEXT.get(str(part.get("type"))) if isinstance(part, dict) else None
    if text_key is None:
        given = shown(part.get("type")) if isinstance(part, dict) else "no object"
        raise wrong(f"content part type '{given}' is not supported; supported: input_text, output_text", key)
    unknown = next((name for name in part if name not in _PART_KEYS), None)
    if unknown is not None:
        raise wrong(f"unknown field '{shown(unknown)}'; allowed: type, text", f"{key}.{shown(unknown)}")
    if not isinstance(part.get(text_key), str):
        raise wrong(f"'{text_key}' must be a string", f"{key}.{text_key}")
    return str(part[text_key])


Input = Annotated[
    tuple[Message, ...], BeforeValidator(_input, json_schema_input_type=str | list[dict[str, Any]])
]

# --- format and tools --------------------------------------------------------------------------------


class TextFormat(WireModel):
    """Text, any JSON object, or JSON of a given schema."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: FunctionName | None = None
    schema_: BoundedObject | None = Field(default=None, alias="schema")
    description: str | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _schema_for_its_type(self) -> Self:
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise wrong("'schema' is required for type 'json_schema', and allowed only there", ".schema")
        if self.type == "json_schema" and self.name is None:
            raise wrong("'name' is required for type 'json_schema'", ".name")
        return self

    def to_format(self) -> ResponseFormat:
        """The domain's format."""
        return ResponseFormat(type=self.type, schema=self.schema_, name=self.name or "response")


class TextSpec(WireModel):
    """How the text is to be."""

    format: TextFormat | None = None
    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "verbosity": Unsupported("say it in the prompt", ("medium",)),
    }


class FileSearchTool(RetrievalSpec):
    """The one tool: search these vector stores, for every answer."""

    type: Literal["file_search"]


def _tool_kind(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind != "file_search":
        raise wrong(f"tools of type '{shown(kind)}' are not supported; allowed: file_search", ".type")
    return value


ToolField = Annotated[FileSearchTool, BeforeValidator(_tool_kind)]


def _tool_choice(value: Any) -> Any:
    if value in (None, "auto", "none", "required") or value == {"type": "file_search"}:
        return value
    raise wrong('\'tool_choice\' must be none, auto, required or {"type": "file_search"}')


# --- the request ------------------------------------------------------------------------------------


class ResponsesRequest(WireModel):
    """The body of `POST /v1/responses`."""

    model: ModelName
    input: Input
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    text: TextSpec | None = None
    tools: Annotated[list[ToolField], Field(max_length=1)] | None = None
    tool_choice: Annotated[Any, BeforeValidator(_tool_choice)] = None
    include: list[str] | None = None
    store: bool | None = None
    background: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    previous_response_id: str | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "default", "flex", "priority"] | None = None
    truncation: Literal["disabled"] | None = None
    user: str | None = None
    ignored: ClassVar[frozenset[str]] = frozenset(
        {
            "max_tool_calls",
            "parallel_tool_calls",
            "prompt_cache_key",
            "prompt_cache_retention",
            "safety_identifier",
        }
    )
    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "conversation": Unsupported("send 'previous_response_id', or the items themselves"),
        "prompt": Unsupported("there are no stored prompts"),
        "reasoning": Unsupported("no reasoning model is served", ({},)),
        "top_logprobs": Unsupported("chat completions have log probabilities", (0,)),
    }

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.background and self.store is False:
            raise wrong("'background' needs 'store': what nobody waits for must be kept", ".store")
        if self.stream_options is not None and not self.stream:
            raise wrong("'stream_options' is allowed only with 'stream': true", ".stream_options")
        unknown = next((one for one in self.include or () if one not in _INCLUDABLE), None)
        if unknown is not None:
            raise wrong(
                f"'{shown(unknown)}' cannot be included; allowed: {', '.join(_INCLUDABLE)}", ".include"
            )
        if self.tool_choice not in (None, "auto", "none") and not self.tools:
            raise wrong("'tool_choice' asks for a call and 'tools' is empty", ".tool_choice")
        return self

    @property
    def search(self) -> FileSearchTool | None:
        """The search that is wanted."""
        return self.tools[0] if self.tools and self.tool_choice != "none" else None

    def tier_name(self) -> str:
        """The tier as the answer names it."""
        if self.background and self.service_tier in (None, "auto"):
            return "flex"  # nobody waits: it gets what others leave over
        return self.service_tier if self.service_tier in ("flex", "priority") else "default"

    def to_call(
        self, history: Sequence[Message], *, timeout_s: float | None, response_id: str
    ) -> GenerationCall:
        """The call as the gateway takes it.

        Args:
            history: the conversation before this input.
            timeout_s: the caller's deadline.
            response_id: also the engine's request id.
        """
        instructions = [Message(role="system", content=self.instructions)] if self.instructions else []
        text = self.text.format if self.text and self.text.format else TextFormat()
        return GenerationCall(
            model=self.model,
            request=GenerationRequest(
                request_id=response_id,
                messages=(*instructions, *history, *self.input),
                sampling=SamplingParams(
                    max_tokens=self.max_output_tokens,
                    temperature=1.0 if self.temperature is None else self.temperature,
                    top_p=1.0 if self.top_p is None else self.top_p,
                ),
                response_format=text.to_format(),
            ),
            retrieval=self._retrieval(),
            timeout_s=timeout_s,
            service_tier=_TIERS[self.service_tier or "auto"],
            whole=not self.stream,
        )

    def _retrieval(self) -> RetrievalOptions | None:
        search = self.search
        return search.to_options() if search is not None else None
