"""The legacy text completion request and the `GenerationCall`s it becomes, one per prompt.

`app.api.completions` calls it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, PlainValidator, model_validator

from actors.types import GenerationCall, GenerationRequest
from app.schemas.bad_input import wrong
from app.schemas.common import Inputs, Unsupported, text_inputs
from app.schemas.generation import GenerationFields

MAX_PROMPTS = 64
DEFAULT_MAX_TOKENS = 16  # OpenAI's


def _prompts(value: Any) -> Inputs:
    prompts = text_inputs(value)
    if len(prompts) > MAX_PROMPTS:
        raise wrong(f"{len(prompts)} prompts, at most {MAX_PROMPTS} allowed")
    return prompts


class CompletionRequest(GenerationFields):
    """The body of `POST /v1/completions`."""

    prompt: Annotated[
        Inputs,
        PlainValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
    ]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: Annotated[int, Field(ge=1, le=8)] | None = None
    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "suffix": Unsupported("no model that is served fills in the middle", ("",)),
        "logit_bias": Unsupported("no engine applies it", ({},)),
    }

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise wrong("'best_of' is not supported unless it equals 'n'", ".best_of")
        if self.echo and self.logprobs is not None:
            raise wrong(
                "'echo' with 'logprobs' is not supported: prompts have no log probabilities", ".logprobs"
            )
        return self

    def to_calls(self, *, timeout_s: float | None, request_id: str) -> list[GenerationCall]:
        """One call per prompt, in order; ids of the engine's requests count up from `request_id`."""
        prompts: Sequence[str | tuple[int, ...]] = self.prompt
        many = len(prompts) > 1
        return [
            GenerationCall(
                model=self.model,
                request=self._request(prompt, f"{request_id}-{index}" if many else request_id),
                timeout_s=timeout_s,
                service_tier=self.priority(),
                whole=not self.stream,
            )
            for index, prompt in enumerate(prompts)
        ]

    def _request(self, prompt: str | tuple[int, ...], request_id: str) -> GenerationRequest:
        return GenerationRequest(
            request_id=request_id,
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=None if isinstance(prompt, str) else prompt,
            sampling=self.sampling(
                max_tokens=self.max_tokens or DEFAULT_MAX_TOKENS,
                logprobs=self.logprobs is not None,
                top_logprobs=self.logprobs or 0,
            ),
            echo=bool(self.echo),
        )
