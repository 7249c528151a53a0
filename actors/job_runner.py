"""`JobRunner`: the Serve deployment that does durable work; today that is ingestion.

Nobody calls it: it takes its work from the job log and scales on how much is pending. This module only puts the
parts together; the work is `actors.ingestion`, taking and settling jobs is `actors.job_loop`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from pydantic import Field

from actors.engines.embedding import EmbeddingModelInfo, load_spans
from actors.errors import ShoalError
from actors.handles.embedder import EmbedderClient
from actors.index.chroma import ChromaIndex
from actors.ingestion import Embedding, Ingestion
from actors.job_loop import JobLoop, JobLoopConfig
from actors.policies.ingestion import KIND
from actors.policies.load import LoadSnapshot
from actors.stores.catalog import Catalog
from actors.stores.config import StorageConfig
from actors.stores.documents import DocumentStore
from actors.stores.jobs import JobLog, JobLogConfig
from actors.stores.parsing import ParseLimits, Parser
from actors.stores.redis import connect
from actors.telemetry import configure_logging, logger
from actors.types import Embeddings

_REDIS_TIMEOUT_S = 5.0  # nobody waits for a job's commands: patience costs less than trying again
_INFO_TIMEOUT_S = 5.0
_INFO_PAUSE_S = 1.0
_log = logger("job_runner")


class JobRunnerConfig(JobLoopConfig):
    """One deployment of job runners."""

    storage: StorageConfig = Field(default_factory=StorageConfig, description="Where durable state lives.")
    embedder_app: str = Field(default="retrieval", description="Serve application of the embedder.")
    embed_batch: int = Field(
        default=32, ge=1, le=2048, description="Chunks per call of the embedder; progress moves with each."
    )
    embed_timeout_s: float = Field(default=300.0, gt=0, description="For one such call.")
    parse: ParseLimits = Field(default_factory=ParseLimits, description="What one document may cost.")
    jobs: JobLogConfig = Field(default_factory=JobLogConfig, description="Leases and retention.")


class JobRunner:
    """A Serve deployment without callers.

    Args:
        config: see `JobRunnerConfig`.
    """

    def __init__(self, config: JobRunnerConfig) -> None:
        configure_logging()
        self._config = config
        url = config.storage.effective_redis_url
        self._redis = connect(url, timeout_s=_REDIS_TIMEOUT_S, client_name="shoal-jobs")
        self._blocking = connect(
            url, timeout_s=config.poll_s + _REDIS_TIMEOUT_S, client_name="shoal-jobs-wait"
        )
        self._jobs = JobLog(self._redis, config.jobs, self._blocking)
        self._index = ChromaIndex(config.storage.effective_chroma_url)
        self._embedder = EmbedderClient(config.embedder_app)
        self._loop: JobLoop | None = None
        self._starting = asyncio.get_running_loop().create_task(self._start())

    async def check_health(self) -> None:
        """Return while jobs are taken, or while the embedder is waited for.

        Raises:
            Unavailable: the loop ended or hangs.
            Exception: what ended the start.
        """
        if self._starting.done():
            self._starting.result()
        if self._loop is not None:
            await self._loop.check_health()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """The load for the scaling policy: what waits in the one log, and what runs here."""
        stats = await self._jobs.stats(KIND)
        return LoadSnapshot(
            queued=stats.waiting,
            running=self._loop.active if self._loop is not None else 0,
            oldest_age_s=stats.oldest_age_s,
            replica_concurrency=self._config.concurrency,
        ).to_stats()

    async def aclose(self) -> None:
        """Stop; unfinished jobs go back to the log at once."""
        self._starting.cancel()
        if self._loop is not None:
            await self._loop.stop()
        await asyncio.gather(self._redis.aclose(), self._blocking.aclose(), self._index.close())

    async def __del__(self) -> None:
        """Serve awaits this at the end of the replica."""
        if hasattr(self, "_starting"):
            await self.aclose()

    async def _start(self) -> None:
        model = (await self._model()).model
        embedding = Embedding(
            embed=self._embed,
            model=model,
            tokenize=await asyncio.to_thread(load_spans, model),
            batch_size=self._config.embed_batch,
        )
        documents = DocumentStore(self._config.storage.effective_documents_url)
        ingestion = Ingestion(
            documents, Catalog(self._redis), self._index, Parser(self._config.parse), embedding
        )
        self._loop = JobLoop(self._jobs, ingestion, self._config)
        self._loop.start()
        _log.info("job_runner_ready", model=model, concurrency=self._config.concurrency)

    async def _model(self) -> EmbeddingModelInfo:
        """What the embedder runs; it may still be loading."""
        while True:
            try:
                return await self._embedder.info(timeout_s=_INFO_TIMEOUT_S)
            except ShoalError as error:
                _log.info("waiting_for_embedder", reason=error.message)
                await asyncio.sleep(_INFO_PAUSE_S)

    async def _embed(self, texts: Sequence[str]) -> Embeddings:
        # One vector per window that the model reads: pooling the windows of a chunk costs recall.
        return await self._embedder.embed(texts, timeout_s=self._config.embed_timeout_s, pool=False)
