"""The arguments of the application builders, composed from the actors' own config classes.

Read by `app.main` from the `args` of a Serve config file. An unknown key anywhere is refused with its path and
the keys that are allowed there; values are checked by the classes that own them.
"""

import types
import typing
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from actors.batching_queue import BatchingQueueConfig
from actors.embedder import EmbedderConfig
from actors.engines.choice import EngineChoice
from actors.gateway_config import GatewayConfig
from actors.job_runner import JobRunnerConfig
from actors.local_services import ChromaServerConfig, ValkeyServerConfig
from actors.ready_gate import ReadyGateConfig
from actors.retriever import RetrieverConfig
from actors.stores.config import StorageConfig

Part = TypeVar("Part", bound=BaseModel)


class Args(BaseModel):
    """Base of all builders' arguments: unknown keys are named with what is allowed in their place."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, data: Any) -> Any:
        problems = list(unknown_keys(cls, data))
        if problems:
            raise ValueError("; ".join(problems))
        return data


class ModelArgs(Args):
    """`app.main:build_model`: one model, served by an application of the same name."""

    model: str = Field(min_length=1, description="Public name of the model; the application's name.")
    engine: EngineChoice = Field(description="Which engine, with its settings.")
    queue: BatchingQueueConfig = Field(default_factory=BatchingQueueConfig, description="The model's queue.")
    cache_dir: Path = Field(
        default=Path("~/.shoal/models"), description="Where weights that had to be prepared are kept."
    )


class GatewayArgs(Args, GatewayConfig):
    """`app.main:build_gateway`: the fields of `GatewayConfig`."""


class ReadyArgs(Args, ReadyGateConfig):
    """`app.main:build_ready`: the fields of `ReadyGateConfig`."""


class StorageArgs(Args):
    """Base of the applications whose actors share one `storage`: it is given once, beside them."""

    storage: StorageConfig = Field(default_factory=StorageConfig, description="Where durable state lives.")

    @model_validator(mode="after")
    def _storage_is_given_once(self) -> Self:
        for name in type(self).model_fields:
            part = getattr(self, name)
            if isinstance(part, BaseModel) and "storage" in part.model_fields_set:
                raise ValueError(f"args.{name}.storage: give it once, as args.storage")
        return self

    def with_storage(self, part: Part) -> Part:
        """An actor's config with the shared `storage` in it."""
        return part.model_copy(update={"storage": self.storage})


class LocalServicesArgs(StorageArgs):
    """`app.main:build_local_services`: the servers that run here because no outside ones are named."""

    valkey: ValkeyServerConfig = Field(
        default_factory=ValkeyServerConfig, description="Started unless storage.redis_url is set."
    )
    chroma: ChromaServerConfig = Field(
        default_factory=ChromaServerConfig, description="Started unless storage.chroma_url is set."
    )


class RetrievalArgs(StorageArgs):
    """`app.main:build_retrieval`: the retrieval stages and the ingestion that feeds them."""

    embedder: EmbedderConfig = Field(default_factory=EmbedderConfig, description="The embedding model.")
    retriever: RetrieverConfig = Field(default_factory=RetrieverConfig, description="Search.")
    jobs: JobRunnerConfig = Field(default_factory=JobRunnerConfig, description="Ingestion.")


def unknown_keys(model: type[BaseModel], data: Any, path: str = "args") -> typing.Iterator[str]:
    """Describe every key of `data` that `model` and the models inside it do not have.

    Args:
        model: what `data` is to be validated as.
        data: parsed YAML; anything but a mapping is left to the validation proper.
        path: where `data` stands, for messages.

    Yields:
        One sentence per unknown key, with the allowed ones.
    """
    if not isinstance(data, dict):
        return
    for key, value in data.items():
        field = model.model_fields.get(key)
        if field is None:
            yield f"unknown key {path}.{key}; allowed: {', '.join(sorted(model.model_fields))}"
        else:
            for nested in _models_in(field.annotation):
                yield from unknown_keys(nested, value, f"{path}.{key}")


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The config classes that a field may hold: itself, or the parts of a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [model for part in typing.get_args(annotation) for model in _models_in(part)]
    return []
