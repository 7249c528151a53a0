"""`Embedder`: one embedding model, fed in micro-batches by token count.

Owns the model, the pieces of text that wait for it and the one thread that runs it. Called through
`actors.handles.embedder` by the gateway (`/v1/embeddings`), the retriever (queries) and ingestion (passages).
How pieces are picked is `actors.policies.batching`, the model is behind `actors.engines.embedding`.

Not `@serve.batch`: it batches calls, and one call here is anything from a question to two thousand texts whose
windows belong in different batches; it knows no priority, so a question would wait behind an ingestion; an
exception fails every caller of the batch; and one in its size function ends its loop (ray#66140).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from pydantic import Field

from actors.engines.embedding import (
    EmbeddingKind,
    EmbeddingModel,
    EmbeddingModelConfig,
    EmbeddingModelInfo,
    Tokenized,
    Vectors,
    load_model,
)
from actors.errors import EngineFailed, InvalidRequest, Overloaded, ShoalError
from actors.policies.batching import BatchQueue
from actors.policies.metering import LoadMeter
from actors.telemetry import configure_logging, logger
from actors.types import Embeddings

_HEALTH_TIMEOUT_S = 30.0  # a health check waits for the running batch, not for the queue
_LATEST = 0.2  # weight of the latest batch in the measured speed
_log = logger("embedder")


class EmbedderConfig(EmbeddingModelConfig):
    """The embedding model and its batches."""

    max_batch_tokens: int = Field(
        default=1024,
        ge=1,
        description="Padded tokens of one batch. A CPU gains nothing from more and a question waits for one"
        " batch; a GPU likes 16,384.",
    )
    max_inputs: int = Field(default=2048, ge=1, description="Texts of one call.")
    max_wait_s: float = Field(
        default=120.0, gt=0, description="A call that would wait longer is refused with a Retry-After."
    )


@dataclass(eq=False, slots=True)
class _Call:
    """One call: its rows are filled as batches come back."""

    rows: Vectors
    left: int  # rows without a vector
    answer: asyncio.Future[None]

    def fill(self, at: int, vector: Vectors) -> None:
        self.rows[at] = vector
        self.left -= 1
        if self.left == 0 and not self.answer.done():
            self.answer.set_result(None)

    def fail(self, error: ShoalError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


@dataclass(eq=False, slots=True)
class _Piece:
    """One window of one text of a call."""

    call: _Call
    row: int
    window: tuple[int, ...]


class Embedder:
    """A Serve deployment.

    Args:
        config: see `EmbedderConfig`.
        model: the loaded model; None: what the config names.

    Raises:
        EngineFailed: the model cannot be loaded.
    """

    def __init__(self, config: EmbedderConfig, model: EmbeddingModel | None = None) -> None:
        configure_logging()
        self._config = config
        started = time.monotonic()
        self._model = model or load_model(config)
        self._queue: BatchQueue[_Piece] = BatchQueue(config.max_batch_tokens)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="embed")
        self._worker: asyncio.Task[None] | None = None
        self._running = 0  # pieces in the batch
        self._tokens_per_s = 0.0  # measured; 0: not yet
        self._meter = LoadMeter(max(1.0, config.max_batch_tokens / self._model.info.window_tokens))
        _log.info("embedder_ready", model=config.model, start_up_s=round(time.monotonic() - started, 2))

    async def embed(
        self,
        inputs: Sequence[str | Sequence[int]],
        kind: EmbeddingKind = "passage",
        *,
        dimensions: int | None = None,
        pool: bool = True,
    ) -> Embeddings:
        """Embed texts or token ids; cancelling gives up what has not been embedded yet.

        A text longer than the model's window becomes several vectors. Pooled, they are averaged by length into
        one, which blurs them: for search a chunk should be indexed under every one of them and count by its
        best (dense nDCG@10 on chunks of 800 tokens: best window .717, mean .660, element-wise maximum .620).

        Args:
            inputs: 1 to `max_inputs` texts, or lists of this model's token ids.
            kind: "query" for questions, which also go first; "passage" for everything else.
            dimensions: must be the model's, if given.
            pool: one vector per text; else one per window, and `rows` says how many each text has.

        Raises:
            InvalidRequest: an input is empty or unknown to the model, or there are too many, or `dimensions`.
            Overloaded: the wait would be longer than `max_wait_s`.
            EngineFailed: the model failed on one of these texts.
        """
        self._check(len(inputs), dimensions)
        self._refuse_if_late(query=kind == "query")
        texts = await asyncio.to_thread(self._model.tokenize, inputs, kind)
        rows = await self._vectors(texts, query=kind == "query")
        tokens = sum(text.tokens for text in texts)
        counts = tuple(len(text.windows) for text in texts)
        if pool:
            rows, counts = _pooled(texts, rows), ()
        return Embeddings(
            vectors=rows.astype("<f4").tobytes(), dimensions=rows.shape[1], tokens=tokens, rows=counts
        )

    async def answer(
        self, inputs: Sequence[str | Sequence[int]], kind: EmbeddingKind, **options: Any
    ) -> AsyncIterator[Embeddings | None]:
        """`embed` for callers over a handle; the first item, None, says that the call has arrived."""
        yield None
        yield await self.embed(inputs, kind, **options)

    async def info(self) -> EmbeddingModelInfo:
        """What the model is."""
        return self._model.info

    async def check_health(self) -> None:
        """Embed a word, ahead of everything but the running batch.

        Raises:
            EngineFailed: the model failed or hangs.
        """
        text = self._model.tokenize(["health"], "query")
        try:
            async with asyncio.timeout(_HEALTH_TIMEOUT_S):
                await self._vectors(text, query=True)
        except TimeoutError:
            raise EngineFailed(f"the embedding model did not answer within {_HEALTH_TIMEOUT_S:g} s") from None

    def record_autoscaling_stats(self) -> dict[str, float]:
        """The load for the scaling policy, and what waits."""
        now = time.monotonic()
        load = self._meter.snapshot(
            now,
            queued=len(self._queue),
            running=self._running,
            queued_work_s=self._seconds(self._queue.tokens),
            oldest_age_s=self._queue.oldest_age_s(now),
        )
        return {**load.to_stats(), "queued_tokens": float(self._queue.tokens)}

    # --- before the queue ----------------------------------------------------------------------------

    def _check(self, inputs: int, dimensions: int | None) -> None:
        if not 1 <= inputs <= self._config.max_inputs:
            raise InvalidRequest(f"{inputs} inputs; 1 to {self._config.max_inputs} are allowed", "input")
        own = self._model.info.dimensions
        if dimensions not in (None, own):
            raise InvalidRequest(
                f"this model's vectors have {own} dimensions and cannot be shortened", "dimensions"
            )

    def _refuse_if_late(self, *, query: bool) -> None:
        wait_s = self._seconds(self._queue.tokens_before(query=query))
        if wait_s > self._config.max_wait_s:
            raise Overloaded(
                f"the embedding model is {wait_s:.0f} s behind",
                retry_after_s=wait_s - self._config.max_wait_s,
            )

    def _seconds(self, tokens: int) -> float:
        return tokens / self._tokens_per_s if self._tokens_per_s else 0.0

    # --- the queue and the thread --------------------------------------------------------------------

    async def _vectors(self, texts: Sequence[Tokenized], *, query: bool) -> Vectors:
        windows = [window for text in texts for window in text.windows]
        loop = asyncio.get_running_loop()
        rows: Vectors = np.empty((len(windows), self._model.info.dimensions), dtype=np.float32)
        self._meter.arrived(time.monotonic(), len(windows))
        call = _Call(rows=rows, left=len(windows), answer=loop.create_future())
        for row, window in enumerate(windows):
            piece = _Piece(call=call, row=row, window=window)
            self._queue.push(piece, len(window), query=query, now=time.monotonic())
        if self._worker is None or self._worker.done():
            # A task starts in the next turn of the loop: callers of the same turn share its first batch.
            self._worker = loop.create_task(self._work())
        await call.answer
        return rows

    async def _work(self) -> None:
        while batch := self._queue.pop_batch(lambda piece: not piece.call.answer.done()):
            self._running = len(batch)
            started = time.monotonic()
            await self._embed(batch)
            self._measure(batch, time.monotonic() - started)
            self._running = 0

    async def _embed(self, batch: list[_Piece]) -> None:
        windows = [piece.window for piece in batch]
        try:
            vectors = await asyncio.get_running_loop().run_in_executor(
                self._thread, self._model.embed, windows
            )
            _check_vectors(vectors, len(batch))
        except Exception as error:
            await self._embed_apart(batch, error)
            return
        for piece, vector in zip(batch, vectors, strict=True):
            piece.call.fill(piece.row, cast(Vectors, vector))

    async def _embed_apart(self, batch: list[_Piece], error: Exception) -> None:
        """Halve a batch that failed until the text is alone that is to blame: the others get their vectors."""
        if len(batch) == 1:
            _log.error("embedding_failed", error=repr(error), tokens=len(batch[0].window))
            batch[0].call.fail(EngineFailed("the embedding model failed on one of the texts"))
            return
        await self._embed(batch[: len(batch) // 2])
        await self._embed(batch[len(batch) // 2 :])

    def _measure(self, batch: list[_Piece], elapsed_s: float) -> None:
        self._meter.finished(elapsed_s / len(batch))
        speed = sum(len(piece.window) for piece in batch) / max(elapsed_s, 1e-6)
        known = self._tokens_per_s
        self._tokens_per_s = speed if known == 0 else known + _LATEST * (speed - known)


def _check_vectors(vectors: Vectors, count: int) -> None:
    if len(vectors) != count or not np.isfinite(vectors).all():
        raise FloatingPointError("the model's answer is no vector per window")


def _pooled(texts: Sequence[Tokenized], rows: Vectors) -> Vectors:
    """One vector per text: the mean of its windows, weighted by their length, of length 1 again."""
    pooled: Vectors = np.empty((len(texts), rows.shape[1]), dtype=np.float32)
    at = 0
    for index, text in enumerate(texts):
        weights = np.array([len(window) for window in text.windows], dtype=np.float32)
        mean = weights @ rows[at : at + len(weights)]
        pooled[index] = mean / max(float(np.linalg.norm(mean)), 1e-12)
        at += len(weights)
    return pooled
