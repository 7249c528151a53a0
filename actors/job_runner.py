"""`JobRunner`: the Serve deployment that does durable work: ingestion, background responses and batches.

Nobody calls it: it takes its work from the job log and scales on how much is pending. This module only puts the
parts together; the work is `actors.ingestion`, `actors.responder` and `actors.batcher`, taking and settling jobs is
`actors.job_loop`.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from pydantic import Field

from actors.answering import Answering, Deadlines, EmbeddingCalls
from actors.batcher import Batcher, LineApp
from actors.engines.embedding import EmbeddingModelInfo, load_spans
from actors.errors import ShoalError
from actors.handles.embedder import EmbedderClient
from actors.index.chroma import ChromaIndex
from actors.ingestion import Embedding, Ingestion
from actors.job_loop import JobLoop, JobLoopConfig
from actors.policies.ingestion import KIND
from actors.policies.load import LoadSnapshot
from actors.policies.responses import KIND as RESPONSES
from actors.rag import RagStage, RetrievalSettings
from actors.responder import Responder
from actors.stores.batches import BatchLog
from actors.stores.catalog import Catalog
from actors.stores.config import StorageConfig
from actors.stores.documents import DocumentStore
from actors.stores.jobs import JobLog, JobLogConfig
from actors.stores.limits import LimitStore
from actors.stores.notices import Notices
from actors.stores.parsing import ParseLimits, Parser
from actors.stores.redis import connect
from actors.stores.response_log import CANCELLED, ResponseLog
from actors.telemetry import configure_logging, logger
from actors.types import Embeddings
from actors.webhooks import WebhookConfig, WebhookOutbox, WebhookSender

_REDIS_TIMEOUT_S = 5.0  # nobody waits for a job's commands: patience costs less than trying again
_INFO_TIMEOUT_S = 5.0
_INFO_PAUSE_S = 1.0
_WATCH_S = 60.0  # one wait for a cancellation; nothing depends on it
_log = logger("job_runner")


class ResponderConfig(JobLoopConfig):
    """How one runner makes background responses."""

    concurrency: int = Field(
        default=128,
        ge=1,
        le=4096,
        description="Responses at the same time. They wait in their model's queue, which is fair: take many.",
    )
    attempt_timeout_s: float = Field(
        default=3600, gt=0, description="Longest attempt; what exceeds it goes on in the next one."
    )
    search_deadline_s: float = Field(default=10.0, gt=0, description="For retrieval; nobody waits for it.")


class BatcherConfig(JobLoopConfig):
    """How one runner works on batches."""

    concurrency: int = Field(default=4, ge=1, le=64, description="Batches at the same time.")
    lines: int = Field(default=32, ge=1, le=1024, description="Lines of one batch at the same time.")


@dataclass(frozen=True, slots=True)
class Endings:
    """Whether what a webhook tells is true already."""

    responses: ResponseLog
    batches: BatchLog

    async def has_ended(self, tenant: str, subject: str) -> bool:
        """Whether a response or a batch is final.

        Raises:
            NotFound: there is no such thing any more.
        """
        kind, _, job_id = subject.partition("_")
        if kind == "resp":
            return await self.responses.has_ended(tenant, job_id)
        return await self.batches.has_ended(tenant, job_id)


MakesLines = Callable[[Answering, EmbeddingCalls], LineApp]


class JobRunnerConfig(JobLoopConfig):
    """One deployment of job runners; the fields of the loop are ingestion's."""

    storage: StorageConfig = Field(default_factory=StorageConfig, description="Where durable state lives.")
    embedder_app: str = Field(default="retrieval", description="Serve application of the embedder.")
    embed_batch: int = Field(
        default=32, ge=1, le=2048, description="Chunks per call of the embedder; progress moves with each."
    )
    embed_timeout_s: float = Field(default=300.0, gt=0, description="For one such call.")
    parse: ParseLimits = Field(default_factory=ParseLimits, description="What one document may cost.")
    jobs: JobLogConfig = Field(default_factory=JobLogConfig, description="Leases and retention.")
    responses: ResponderConfig = Field(default_factory=ResponderConfig, description="Background responses.")
    webhooks: WebhookConfig = Field(
        default_factory=WebhookConfig, description="Who is told of responses and batches that ended."
    )
    batches: BatcherConfig = Field(default_factory=BatcherConfig, description="Batches.")


class JobRunner:
    """A Serve deployment without callers.

    Args:
        config: see `JobRunnerConfig`.
        lines: makes what answers lines of batches; wire formats are not this layer's.
    """

    def __init__(self, config: JobRunnerConfig, lines: MakesLines) -> None:
        configure_logging()
        self._config = config
        url = config.storage.effective_redis_url
        self._redis = connect(url, timeout_s=_REDIS_TIMEOUT_S, client_name="shoal-jobs")
        longest_s = max(config.poll_s, config.responses.poll_s, config.batches.poll_s)
        self._blocking = connect(url, timeout_s=longest_s + _REDIS_TIMEOUT_S, client_name="shoal-jobs-wait")
        self._jobs = JobLog(self._redis, config.jobs, self._blocking)
        self._index = ChromaIndex(config.storage.effective_chroma_url)
        self._embedder = EmbedderClient(config.embedder_app)
        self._loop: JobLoop | None = None
        self._limits = LimitStore(self._redis)
        self._answering = self._answers()
        embeddings = EmbeddingCalls(self._embedder, self._limits, config.embed_timeout_s)
        self._notices = Notices(self._redis)
        log = ResponseLog(self._redis, self._notices)
        outbox, batch_log = WebhookOutbox(self._jobs, config.webhooks), BatchLog(self._redis)
        self._responses = JobLoop(self._jobs, Responder(self._answering, log, outbox), config.responses)
        batcher = Batcher(
            log=batch_log,
            catalog=Catalog(self._redis),
            documents=DocumentStore(config.storage.effective_documents_url),
            app=lines(self._answering, embeddings),
            webhooks=outbox,
            concurrency=config.batches.lines,
        )
        self._batches = JobLoop(self._jobs, batcher, config.batches)
        self._sender = WebhookSender(config.webhooks, Endings(log, batch_log).has_ended)
        webhooks = JobLoopConfig(concurrency=8, give_up_after_s=config.webhooks.give_up_after_s)
        self._webhooks = JobLoop(self._jobs, self._sender, webhooks)
        self._always = (self._responses, self._batches, self._webhooks)
        for loop in self._always:
            loop.start()
        self._cancelling = asyncio.get_running_loop().create_task(self._watch_cancellations())
        self._starting = asyncio.get_running_loop().create_task(self._start())

    async def check_health(self) -> None:
        """Return while jobs are taken, or while the embedder is waited for.

        Raises:
            Unavailable: the loop ended or hangs.
            Exception: what ended the start.
        """
        if self._starting.done():
            self._starting.result()
        await asyncio.gather(*(loop.check_health() for loop in self._always))
        if self._loop is not None:
            await self._loop.check_health()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """The load for the scaling policy: what waits in the logs, and what runs here.

        Responses wait for a model, not for a runner: they count only where no runner has taken them.
        """
        stats, responses = await asyncio.gather(self._jobs.stats(KIND), self._jobs.stats(RESPONSES))
        share = self._config.concurrency / self._config.responses.concurrency
        return LoadSnapshot(
            queued=stats.waiting + round(responses.waiting * share),
            running=self._loop.active if self._loop is not None else 0,
            oldest_age_s=max(stats.oldest_age_s, responses.oldest_age_s),
            replica_concurrency=self._config.concurrency,
        ).to_stats()

    async def aclose(self) -> None:
        """Stop; unfinished jobs go back to the log at once."""
        for task in (self._starting, self._cancelling):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        loops = (self._loop, *self._always)
        await asyncio.gather(*(loop.stop() for loop in loops if loop is not None))
        await asyncio.gather(self._answering.aclose(), self._notices.aclose(), self._sender.aclose())
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

    def _answers(self) -> Answering:
        own = self._config.responses
        retrieval = RetrievalSettings(app_name=self._config.embedder_app, deadline_s=own.search_deadline_s)
        return Answering(
            f"jobs-{uuid.uuid4().hex[:12]}",
            self._limits,
            RagStage(retrieval),
            Deadlines(default_s=own.attempt_timeout_s, longest_s=own.attempt_timeout_s),
        )

    async def _watch_cancellations(self) -> None:
        """What was cancelled stops at once; a cancellation that is not heard costs the time of a heartbeat."""
        async with self._notices.listen(CANCELLED) as inbox:
            while True:
                job_id = await inbox.get(_WATCH_S)
                if job_id is not None:
                    self._responses.drop(job_id.decode())

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
