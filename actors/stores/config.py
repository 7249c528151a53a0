"""Where durable state lives: one block that every application's `args` carry.

Owns the choice between outside servers (a URL is given) and the local ones (it is not), and the addresses of
the local ones, so that nobody has to look them up by name. `actors.local_services` starts what is local.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field


class StorageConfig(BaseModel):
    """Addresses of Redis/Valkey, Chroma and the document store."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data_dir: Path = Field(
        default=Path("~/.shoal"),
        description="Folder of everything local: stores, documents, weights.",
    )
    redis_url: str | None = Field(
        default=None,
        description="Outside Redis ≥ 7.2 or Valkey ≥ 8; none: a local Valkey.",
    )
    chroma_url: str | None = Field(
        default=None, description="Outside Chroma server (http://host:port); none: a local one."
    )
    documents_url: str | None = Field(
        default=None, description="Object store of documents as an fsspec URL; none: a folder in data_dir."
    )
    chroma_port: int = Field(default=8801, ge=1, le=65535, description="Loopback port of the local Chroma.")

    @property
    def root(self) -> Path:
        """`data_dir`, absolute."""
        return self.data_dir.expanduser().absolute()

    @property
    def valkey_socket(self) -> Path:
        """Unix socket of the local Valkey; its folder is readable by the owner only."""
        return self.root / "valkey" / "valkey.sock"

    @property
    def effective_redis_url(self) -> str:
        """The URL to connect to, outside or local."""
        return self.redis_url or f"unix://{self.valkey_socket}"

    @property
    def effective_chroma_url(self) -> str:
        """The URL to connect to, outside or local."""
        return self.chroma_url or f"http://127.0.0.1:{self.chroma_port}"

    @property
    def effective_documents_url(self) -> str:
        """The fsspec URL of the document store."""
        return self.documents_url or f"file://{self.root / 'documents'}"
