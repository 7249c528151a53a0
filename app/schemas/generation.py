"""The fields that chat and completions share, and the sampling parameters they become."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from actors.types import PriorityClass, SamplingParams
from app.schemas.bad_input import wrong
from app.schemas.common import ModelName, WireModel


def _stops(value: Any) -> Any:
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


Stop = Annotated[
    tuple[Annotated[str, Field(min_length=1, max_length=1000)], ...],
    Field(max_length=16),
    BeforeValidator(_stops, json_schema_input_type=str | list[str]),
]
_MetadataValue = Annotated[str, Field(max_length=512)]
Metadata = Annotated[dict[Annotated[str, Field(max_length=64)], _MetadataValue], Field(max_length=16)]
Penalty = Annotated[float, Field(ge=-2, le=2)]

_TIERS: dict[str, PriorityClass | None] = {
    "auto": None,  # the key's own class
    "default": None,
    "priority": PriorityClass.INTERACTIVE,
    "flex": PriorityClass.BATCH,
}


class StreamOptions(WireModel):
    """What a stream carries besides the answer."""

    include_usage: bool | None = None
    # Padding against traffic analysis; there is none to turn off.
    ignored: ClassVar[frozenset[str]] = frozenset({"include_obfuscation"})


class GenerationFields(WireModel):
    """The fields that `/v1/chat/completions` and `/v1/completions` share."""

    model: ModelName
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=8)] | None = None
    stop: Stop | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    service_tier: Literal["auto", "default", "flex", "priority"] | None = None
    user: str | None = None
    metadata: Metadata | None = None

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise wrong("'stream_options' is allowed only with 'stream': true", ".stream_options")
        return self

    def sampling(self, **more: Any) -> SamplingParams:
        """The shared fields as the engine takes them; `more` are the endpoint's own."""
        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            n=self.n or 1,
            stop=self.stop or (),
            seed=self.seed,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            **more,
        )

    def priority(self) -> PriorityClass | None:
        """The class that `service_tier` asks for; None is the key's own."""
        return _TIERS[self.service_tier or "auto"]

    def tier_name(self) -> str:
        """The tier as the answer names it."""
        return self.service_tier if self.service_tier in {"flex", "priority"} else "default"

    def wants_usage(self) -> bool:
        """Whether the stream ends with a usage chunk."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)
