"""Where durable state lives: one block that every application's `args` carry.

Owns the choice between outside servers (a URL is given) and the local ones (it is not), and the addresses of
the local ones, so that nobody has to look them up by name. `actors.local_services` starts what is local.

A URL may carry a password, and a Serve config file is no place for one: `env:NAME` stands for the value of an
environment variable of the process that connects. The field keeps the name, so dumps and logs show no secret.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

_FROM_ENV = "env:"

Durability = Literal["memory", "appended", "fsynced"]


class StorageConfig(BaseModel):
    """Addresses of Redis/Valkey, Chroma and the document store."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data_dir: Path = Field(
        default=Path("~/.shoal"),
        description="Folder of everything local: stores, documents, weights.",
    )
    redis_url: str | None = Field(
        default=None,
        description="Outside Redis ≥ 7.2 or Valkey ≥ 8, or env:NAME; none: a local Valkey.",
    )
    chroma_url: str | None = Field(
        default=None, description="Outside Chroma server (http://host:port) or env:NAME; none: a local one."
    )
    documents_url: str | None = Field(
        default=None,
        description="Object store of documents as an fsspec URL or env:NAME; none: a folder in data_dir.",
    )
    durability: Durability = Field(
        default="appended",
        description="What Redis must have done with a background response or a batch before it is accepted. "
        "memory: held it, and what a crash of Redis loses is up to its settings. appended: written it to its "
        "append-only file, so that kill -9 loses nothing and a power cut about a second. fsynced: had it on the "
        "disk (WAITAOF), which takes up to a second where appendfsync is everysec.",
    )
    chroma_port: int = Field(default=8801, ge=1, le=65535, description="Loopback port of the local Chroma.")

    @field_validator("redis_url", "chroma_url", "documents_url")
    @classmethod
    def _well_formed(cls, url: str | None) -> str | None:
        if url is not None and url.startswith(_FROM_ENV) and not re.fullmatch(r"env:[A-Z_][A-Z0-9_]*", url):
            raise ValueError("env: must be followed by the name of an environment variable, as env:REDIS_URL")
        return url

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
        return _resolved(self.redis_url, "redis_url") or f"unix://{self.valkey_socket}"

    @property
    def effective_chroma_url(self) -> str:
        """The URL to connect to, outside or local."""
        return _resolved(self.chroma_url, "chroma_url") or f"http://127.0.0.1:{self.chroma_port}"

    @property
    def effective_documents_url(self) -> str:
        """The fsspec URL of the document store."""
        return _resolved(self.documents_url, "documents_url") or f"file://{self.root / 'documents'}"


def _resolved(url: str | None, field: str) -> str | None:
    """The URL itself, or what the environment variable it names holds.

    Raises:
        ValueError: the variable is not set.
    """
    if url is None or not url.startswith(_FROM_ENV):
        return url
    name = url.removeprefix(_FROM_ENV)
    value = os.environ.get(name)
    if not value:
        raise ValueError(f"storage.{field} is {url}, and the environment variable {name} is not set here")
    return value
