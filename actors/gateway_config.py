"""What a gateway can be told: at its start, and while it runs.

Read by `actors.gateway`; `app.config` composes `GatewayConfig` into the arguments of its application.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from actors.rag import RetrievalSettings
from actors.stores.config import StorageConfig
from actors.stores.keys import AuthConfig
from actors.stores.responses import ResponsesConfig


class GatewayConfig(BaseModel):
    """One gateway application."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    storage: StorageConfig = Field(default_factory=StorageConfig, description="Where durable state lives.")
    auth: AuthConfig = Field(default_factory=AuthConfig, description="Who may call.")
    retrieval: RetrievalSettings | None = Field(
        default=None, description="None: this system has no documents and no embeddings."
    )
    responses: ResponsesConfig = Field(
        default_factory=ResponsesConfig, description="Stored and background responses."
    )
    default_timeout_s: float = Field(default=300, gt=0, description="Deadline of a call that names none.")
    max_timeout_s: float = Field(default=3600, gt=0, description="The longest deadline a call may name.")
    max_body_bytes: int = Field(default=10_000_000, gt=0, description="Largest JSON body.")
    max_upload_bytes: int = Field(default=512_000_000, gt=0, description="Largest uploaded file.")
    expose_docs: bool = Field(default=False, description="Serve /docs and /openapi.json.")
    announce_url: str | None = Field(
        default=None, description="Print how to call the system at this URL once every application runs."
    )
    expected_gateways: int = Field(
        default=1, ge=1, description="Gateways that share the limits while Redis is down."
    )


class GatewayRoutes(BaseModel):
    """What may change while the gateway runs: the `user_config` of its deployment."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    aliases: dict[str, str] = Field(default_factory=dict, description="Other names of deployed models.")
