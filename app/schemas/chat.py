"""The chat request: OpenAI's wire shape, checked, and the `GenerationCall` it becomes.

`app.api.chat` calls it. What a model alone can know (context length, template, schema support) is left to the
gateway and the engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from actors.types import (
    GenerationCall,
    GenerationRequest,
    Message,
    ResponseFormat,
    RetrievalOptions,
    ToolCall,
)
from app.schemas.bad_input import shown, wrong
from app.schemas.common import BoundedObject, Unsupported, WireModel
from app.schemas.generation import GenerationFields
from app.schemas.tools import (
    MAX_TOOLS,
    ResponseFormatSpec,
    ToolChoiceField,
    ToolSpec,
    check_choice,
    tools_of,
)

MAX_MESSAGES = 2048

# --- messages ----------------------------------------------------------------------------------------

_PART_TEXT = {"text": "text", "refusal": "refusal"}  # part type: the key that holds its text
_PART_KEYS = frozenset({"type", "text", "refusal", "annotations", "cache_control"})


def _joined(content: Any) -> Any:
    """Text as it is; text parts joined by line breaks, as vLLM does."""
    if not isinstance(content, list):
        return content
    return "\n".join(_part_text(part, f"[{index}]") for index, part in enumerate(content))


def _part_text(part: Any, key: str) -> str:
    if not isinstance(part, dict):
        raise wrong('a content part must be an object like {"type": "text", "text": "…"}', key)
    text_key = _PART_TEXT.get(str(part.get("type")))
    if text_key is None:
        kind = shown(part.get("type"))
        raise wrong(f"content part type '{kind}' is not supported; supported: 'text'", f"{key}.type")
    unknown = next((name for name in part if name not in _PART_KEYS), None)
    if unknown is not None:
        raise wrong(f"unknown field '{shown(unknown)}'; allowed: type, text", f"{key}.{shown(unknown)}")
    if not isinstance(part.get(text_key), str):
        raise wrong(f"'{text_key}' must be a string", f"{key}.{text_key}")
    return str(part[text_key])


class FunctionCall(WireModel):
    """What an assistant called; `arguments` is JSON text."""

    name: Annotated[str, Field(min_length=1)]
    arguments: str


class MessageToolCall(WireModel):
    """A tool call of the history."""

    id: Annotated[str, Field(min_length=1)]
    type: Literal["function"] = "function"
    function: FunctionCall
    ignored: ClassVar[frozenset[str]] = frozenset({"index"})  # clients that put streamed pieces together


class ChatMessage(WireModel):
    """One message; an answer's message is accepted unchanged as history."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        str | None, BeforeValidator(_joined, json_schema_input_type=str | list[dict[str, Any]] | None)
    ] = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    ignored: ClassVar[frozenset[str]] = frozenset(
        {"refusal", "annotations", "reasoning", "reasoning_content", "provider_specific_fields", "parsed"}
    )
    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "function_call": Unsupported("use 'tool_calls'"),
        "audio": Unsupported("messages are text"),
    }

    @model_validator(mode="after")
    def _complete_for_its_role(self) -> Self:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            extra = " or 'tool_calls'" if self.role == "assistant" else ""
            raise wrong(f"a message of role '{self.role}' needs 'content'{extra}", ".content")
        if self.role == "tool" and not self.tool_call_id:
            raise wrong("a message of role 'tool' needs 'tool_call_id'", ".tool_call_id")
        if self.tool_calls and self.role != "assistant":
            raise wrong("only a message of role 'assistant' has 'tool_calls'", ".tool_calls")
        return self

    def to_message(self) -> Message:
        """The domain's message; `developer` is the newer name of `system`."""
        return Message(
            role="system" if self.role == "developer" else self.role,
            content=self.content or "",
            name=self.name,
            tool_calls=tuple(
                ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments)
                for call in self.tool_calls or ()
            ),
            tool_call_id=self.tool_call_id,
        )


# --- retrieval: Shoal's extension --------------------------------------------------------------------


class RankingOptions(WireModel):
    """How passages are ranked, in the terms of OpenAI's vector store search."""

    ranker: Literal["auto", "default-2024-11-15", "default_2024_08_21", "dense", "bm25"] | None = None
    score_threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "hybrid_search": Unsupported("choose a 'ranker': auto (both, fused), dense or bm25"),
    }

    def ranker_name(self) -> Literal["auto", "dense", "bm25"]:
        """The retriever's ranker; OpenAI's dated defaults are ours."""
        return self.ranker if self.ranker in {"dense", "bm25"} else "auto"


class RetrievalSpec(WireModel):
    """Answer from these vector stores."""

    vector_store_ids: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=16)]
    max_num_results: Annotated[int, Field(ge=1, le=50)] | None = None
    filters: BoundedObject | None = None
    ranking_options: RankingOptions | None = None

    def to_options(self) -> RetrievalOptions:
        """The domain's options."""
        ranking = self.ranking_options or RankingOptions()
        return RetrievalOptions(
            vector_store_ids=tuple(self.vector_store_ids),
            max_num_results=self.max_num_results or 5,
            score_threshold=ranking.score_threshold or 0.0,
            filters=self.filters,
            ranker=ranking.ranker_name(),
        )


# --- the request ------------------------------------------------------------------------------------


class ChatRequest(GenerationFields):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[ToolSpec], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoiceField = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormatSpec | None = None
    modalities: list[Literal["text"]] | None = None
    retrieval: RetrievalSpec | None = None
    ignored: ClassVar[frozenset[str]] = frozenset(
        {"prompt_cache_key", "prompt_cache_retention", "safety_identifier"}
    )
    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "audio": Unsupported("answers are text"),
        "function_call": Unsupported("use 'tool_choice'"),
        "functions": Unsupported("use 'tools'"),
        "logit_bias": Unsupported("no engine applies it", ({},)),
        "prediction": Unsupported("there is no predicted output"),
        "reasoning_effort": Unsupported("no reasoning model is served", ("none",)),
        "store": Unsupported("chat completions are never stored", (False,)),
        "verbosity": Unsupported("say it in the prompt", ("medium",)),
        "web_search_options": Unsupported("there is no web search; see 'retrieval'"),
    }

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise wrong("'top_logprobs' needs 'logprobs': true", ".top_logprobs")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise wrong("'max_tokens' is the old name of 'max_completion_tokens': send one", ".max_tokens")
        check_choice(self.tool_choice, tools_of(self.tools))
        return self

    def to_call(self, *, timeout_s: float | None, request_id: str) -> GenerationCall:
        """The call as the gateway takes it."""
        tools = tools_of(self.tools)
        request = GenerationRequest(
            request_id=request_id,
            messages=tuple(message.to_message() for message in self.messages),
            sampling=self.sampling(
                max_tokens=self.max_completion_tokens or self.max_tokens,
                logprobs=bool(self.logprobs),
                top_logprobs=self.top_logprobs or 0,
            ),
            tools=tools,
            tool_choice=check_choice(self.tool_choice, tools),
            parallel_tool_calls=self.parallel_tool_calls is not False,
            response_format=self.response_format.to_format() if self.response_format else ResponseFormat(),
        )
        return GenerationCall(
            model=self.model,
            request=request,
            retrieval=self.retrieval.to_options() if self.retrieval else None,
            timeout_s=timeout_s,
            service_tier=self.priority(),
            whole=not self.stream,
        )
