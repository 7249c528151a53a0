"""The values that cross actors: requests, tickets, grants, tokens, passages.

Owns the vocabulary of the token path. Everyone imports it; it imports nothing of ours. Requests and
tickets are frozen dataclasses; `TokenDelta` and what it carries are array-like msgspec structs, since one
of them is made per engine step and stream and travels as msgpack over the bus. Wire models of the HTTP
API stop at `app.schemas` and never come here. Times are durations in seconds: wall clocks of different
machines are never compared.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

FinishReason = Literal["stop", "length", "tool_calls"]
Role = Literal["system", "developer", "user", "assistant", "tool"]


class PriorityClass(enum.StrEnum):
    """Priority of a request; the queue serves them in this order."""

    INTERACTIVE = "interactive"
    STANDARD = "standard"
    BATCH = "batch"

    @property
    def rank(self) -> int:
        """0 for the most urgent class."""
        return _CLASS_ORDER.index(self)


_CLASS_ORDER = tuple(PriorityClass)


@dataclass(frozen=True, kw_only=True, slots=True)
class Principal:
    """Who is asking: taken from the key alone, never from the request."""

    tenant: str
    priority: PriorityClass = PriorityClass.STANDARD
    key_id: str = ""  # public part of the key; empty in open mode
    scopes: tuple[str, ...] = ("inference", "documents")  # what the key may do; "admin" adds everything


# --- what is asked of a model ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolCall:
    """A complete tool call in a message of the history."""

    id: str
    name: str
    arguments: str  # JSON text, as OpenAI carries it


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One chat message; content parts are joined to text at the HTTP boundary."""

    role: Role
    content: str = ""
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Tool:
    """A function the model may call."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)  # JSON Schema of the arguments
    strict: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolChoice:
    """Which tool may be called: `function` names the forced one, for mode "function" only."""

    mode: Literal["none", "auto", "required", "function"] = "auto"
    function: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseFormat:
    """Structured output: free JSON, or JSON that is valid against `schema`."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    schema: Mapping[str, Any] | None = None
    name: str = "response"


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How tokens are drawn, in OpenAI's terms. `max_tokens` None: as many as the context leaves."""

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    n: int = 1
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """What an earlier attempt has given its reader of one choice."""

    token_ids: tuple[int, ...] = ()
    text_chars: int = 0  # of the answer's text, without what `echo` put before it
    finish_reason: FinishReason | None = None  # the choice has ended


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """One generation for one engine. Exactly one of `messages`, `prompt`, `prompt_token_ids` is set.

    `cache_salt` is set by the gateway from the tenant, so prefix caches never mix tenants. `progress` is set when
    another replica began this answer and died: one entry per choice, in order; the engine goes on behind it.
    """

    request_id: str
    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = field(default_factory=ToolChoice)
    parallel_tool_calls: bool = True
    response_format: ResponseFormat = field(default_factory=ResponseFormat)
    echo: bool = False  # legacy completions: the prompt is returned before the text
    cache_salt: str = ""
    progress: tuple[Progress, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a request without exactly one prompt: a bug of the caller, not of the user."""
        given = [self.messages is not None, self.prompt is not None, self.prompt_token_ids is not None]
        if sum(given) != 1:
            raise ValueError("exactly one of messages, prompt, prompt_token_ids must be set")


# --- what a model answers ----------------------------------------------------------------------------


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log probability of one sampled token, with the alternatives that were asked for."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


class ToolCallDelta(msgspec.Struct, frozen=True, array_like=True):
    """A piece of a tool call: `id` and `name` come with the first piece, `arguments` grow."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class Usage(msgspec.Struct, frozen=True, array_like=True):
    """Tokens of a whole request, over all its choices."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


class TokenDelta(msgspec.Struct, frozen=True, array_like=True):
    """What one engine step adds to one choice.

    Concatenated over a request, `text` is the answer and `token_ids` are its tokens; `finish_reason` ends
    the choice. `usage` comes exactly once, on the request's last delta.
    """

    choice: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    tool_calls: tuple[ToolCallDelta, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


# --- the queue ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Ticket:
    """A request's place in the queue: everything the order depends on, and no payload."""

    request_id: str
    principal: Principal
    prompt_tokens: int
    predicted_output_tokens: int
    timeout_s: float  # time left until the deadline, counted from when the ticket is sent
    waited_s: float = 0.0  # time already waited before this submit (a queue was lost, an attempt failed)
    attempt: int = 1
    sequences: int = 1  # engine slots it takes: `n` of the request
    returning: bool = False  # it was in line before and a fault brings it back: it is not refused again
    preemptible: bool = True  # it can give its slot up and go on elsewhere
    avoid: str = (
        ""  # the replica where its first start is stuck: it runs at once on an idle one or not at all
    )
    suspect: bool = False  # two replicas have died under it in a row: it runs where no other such one does
    prefix: tuple[int, ...] = ()  # chained hashes of the prompt's blocks, salted with the tenant


@dataclass(frozen=True, kw_only=True, slots=True)
class Grant:
    """Permission to run on one replica; credit is taken until the grant is released."""

    request_id: str
    replica_id: str
    waited_s: float  # in the queue, over all attempts
    attempt: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCard:
    """What an engine serves; every replica registers it with its queue, gateways learn it from there."""

    name: str
    context_tokens: int
    tokenizer: str  # "scripted", or the folder that holds tokenizer.json
    template_overhead_tokens: int = 8  # tokens the chat template adds to each message, rounded up
    revision: str = ""  # part of every cache key
    owned_by: str = "shoal"
    created_at: int = 0  # unix seconds of its deployment; 0: not known
    type: Literal["generation", "embedding"] = "generation"


# --- a call as the gateway takes it -----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalOptions:
    """The caller's wish to answer from documents: `retrieval` in a chat request."""

    vector_store_ids: tuple[str, ...]
    max_num_results: int = 5
    score_threshold: float = 0.0
    filters: Mapping[str, Any] | None = None
    ranker: Literal["auto", "dense", "bm25"] = "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationCall:
    """One chat or completion call before the gateway has done anything with it."""

    model: str
    request: GenerationRequest
    retrieval: RetrievalOptions | None = None
    timeout_s: float | None = None  # None: the gateway's default
    service_tier: PriorityClass | None = None  # may lower the key's class, never raise it
    whole: bool = False  # nobody sees it before it is complete: after a failure it begins again elsewhere


@dataclass(frozen=True, kw_only=True, slots=True)
class Embeddings:
    """Vectors as little-endian float32 rows, normalised to length 1."""

    vectors: bytes  # count * dimensions * 4 bytes
    dimensions: int
    tokens: int
    rows: tuple[int, ...] = ()  # vectors of each text, in order; empty: one each


# --- retrieval ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A stored piece of a document. `start` and `end` are character offsets in the parsed text."""

    chunk_id: str  # hash(store, file, version, ordinal)
    ordinal: int
    text: str
    start: int
    end: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Passage:
    """A retrieved chunk with its score, the higher the better."""

    chunk_id: str
    file_id: str
    filename: str
    vector_store_id: str
    text: str
    score: float
    start: int = 0  # character offset in the parsed document
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalQuery:
    """A search over one or more vector stores of one tenant."""

    tenant: str
    vector_store_ids: tuple[str, ...]
    text: str
    max_num_results: int = 10
    score_threshold: float = 0.0
    filters: Mapping[str, Any] | None = None  # OpenAI's comparison and compound filters
    ranker: Literal["auto", "dense", "bm25"] = "auto"  # auto: both, fused


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalResult:
    """Passages, best first; `degraded` names what was left out (`vector=timeout`), empty when nothing was."""

    passages: tuple[Passage, ...]
    degraded: str = ""
    stage_s: Mapping[str, float] = field(default_factory=dict)  # embed, retrieve, rerank → seconds
