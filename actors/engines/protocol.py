"""What every engine can do: the Protocol that `LLMReplica` drives and the contract suite checks.

An engine owns one model in one process tree. It knows nothing of Ray, queues or HTTP. Callers: `LLMReplica`,
benchmarks and `tests/contract/test_engine_contract.py`, which runs over every implementation.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from actors.types import GenerationRequest, ModelCard, TokenDelta


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineCapacity:
    """What an engine can run at once; the replica registers it with its queue as credit."""

    max_sequences: int
    kv_tokens: int  # tokens of KV cache over all sequences


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """A snapshot, cheap enough to take twice a second."""

    running: int  # sequences in the engine's batch
    waiting: int  # accepted by the engine, not in the batch yet
    kv_usage: float  # 0..1 of kv_tokens
    prompt_tokens_total: int  # prefilled since start
    output_tokens_total: int  # produced since start
    preemptions_total: int
    prefix_hit_tokens_total: int = 0


class LLMEngine(Protocol):
    """One model. Methods are called from one event loop and never block it."""

    async def start(self) -> ModelCard:
        """Load the model and get ready to serve.

        Raises:
            EngineFailed: the model cannot be loaded; the message names the reason.
        """

    @property
    def capacity(self) -> EngineCapacity:
        """Known once `start` returned."""

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenDelta]:
        """Run one request and yield what each engine step adds.

        With `request.progress` the answer goes on behind it: nothing of it comes again, nothing is left out, and
        `usage` counts the whole answer. At temperature 0 the bytes are those of an answer without a break.

        Closing the iterator aborts the request; an aborted one simply ends. Otherwise every choice ends with
        a `finish_reason`, and the last delta of the request carries `usage`.

        Raises:
            InvalidRequest: the request is bad in a way only the model knows (schema, tool, token ids).
            ContextLengthExceeded: the rendered prompt leaves no room for one output token, or
                prompt + max_tokens passes the context.
            Conflict: a request with this id runs already.
            CannotResume: this kind of answer cannot go on behind `progress`.
            EngineFailed: the engine died; nothing more comes.
        """

    async def abort(self, request_id: str) -> None:
        """Stop a request within one engine step and free its slot; unknown ids are ignored."""

    def stats(self) -> EngineStats:
        """The current snapshot."""

    async def check_health(self) -> None:
        """Return when the engine makes progress.

        Raises:
            EngineFailed: it is dead or hangs.
        """

    async def stop(self) -> None:
        """End the engine and everything it started; safe to call twice."""
