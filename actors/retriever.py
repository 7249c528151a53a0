"""`Retriever`: the deployment that searches vector stores.

Owns the connections to catalog, documents, vector index and embedder, a small cache of embedded questions, and
the measured load. Called through `actors.handles.retriever` by the gateway. What a search does is
`actors.retrieval`.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from pydantic import Field

from actors.handles.embedder import EmbedderClient
from actors.index import bm25
from actors.index.chroma import ChromaIndex
from actors.index.protocol import Matrix
from actors.policies.metering import LoadMeter
from actors.retrieval import Retrieval
from actors.retrieval_parts import RetrievalConfig, RetrievalParts
from actors.stores.catalog import Catalog
from actors.stores.config import StorageConfig
from actors.stores.documents import DocumentStore
from actors.stores.redis import connect
from actors.telemetry import configure_logging
from actors.types import RetrievalQuery, RetrievalResult

_KEPT_QUESTIONS = 1000


class RetrieverConfig(RetrievalConfig):
    """Where the retriever finds what it asks, and how searches run."""

    storage: StorageConfig = Field(default_factory=StorageConfig, description="Where durable state lives.")
    app_name: str = Field(default="retrieval", description="Serve application of the embedder.")
    concurrency: int = Field(
        default=16, ge=1, description="Searches that one replica can run at once; scaling counts in it."
    )


class Retriever:
    """A Serve deployment.

    Args:
        config: see `RetrieverConfig`.
        parts: what is asked; None: what the config names.
        beside: handles of the other deployments of this application; unused, they make Serve deploy them.
    """

    def __init__(
        self, config: RetrieverConfig, parts: RetrievalParts | None = None, beside: Sequence[object] = ()
    ) -> None:
        configure_logging()
        del beside
        bm25.load()
        self._config = config
        self._retrieval = Retrieval(config, parts or _parts(config))
        self._meter = LoadMeter(config.concurrency)
        self._running = 0

    async def search(self, query: RetrievalQuery, timeout_s: float | None = None) -> RetrievalResult:
        """Search one or more vector stores of a tenant; see `Retrieval.search`."""
        started = time.monotonic()
        self._meter.arrived(started)
        self._running += 1
        try:
            return await self._retrieval.search(query, timeout_s)
        finally:
            self._running -= 1
            self._meter.finished((time.monotonic() - started) / self._config.concurrency)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """The load for the scaling policy."""
        return self._meter.snapshot(time.monotonic(), running=self._running).to_stats()

    async def check_health(self) -> None:
        """Well while the event loop turns: a part that is down is named in answers, a restart would not help."""


class _Questions:
    """Embeds questions, and remembers the latest."""

    def __init__(self, client: EmbedderClient) -> None:
        self._client = client
        self._known: OrderedDict[str, Matrix] = OrderedDict()

    async def embed(self, text: str, timeout_s: float) -> Matrix:
        if text in self._known:
            self._known.move_to_end(text)
            return self._known[text]
        found = await self._client.embed([text], kind="query", timeout_s=timeout_s)
        vector: Matrix = np.frombuffer(found.vectors, dtype="<f4").reshape(1, found.dimensions)
        self._known[text] = vector
        if len(self._known) > _KEPT_QUESTIONS:
            self._known.popitem(last=False)
        return vector


def _parts(config: RetrieverConfig) -> RetrievalParts:
    storage = config.storage
    return RetrievalParts(
        embed=_Questions(EmbedderClient(config.app_name)).embed,
        index=ChromaIndex(storage.effective_chroma_url),
        catalog=Catalog(connect(storage.effective_redis_url)),
        documents=DocumentStore(storage.effective_documents_url),
    )
