"""Ingestion: documents, chunks and tokens per second through the whole running system.

    python -m tests.benchmarks.ingestion [--quick] [--json FILE] [--data DIR]

`DIR/documents.json` is a list of {chunk_link, text}; each becomes a Markdown file that the official client
uploads and attaches. The system is configs/local.yaml without its chat model: real MiniLM, Chroma and Valkey.
Timed from the first upload until the last file is completed, hence searchable.

The baseline is a bare `SentenceTransformer.encode` of the same windows with as many threads, half of it before
and half after, without the system. Windows, because the model reads 256 tokens and a chunk has up to 800: given
whole chunks, `encode` drops the rest without a word; its speed at that is a row without comparison.
"""

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI

from actors.embedder import EmbedderConfig
from actors.engines.embedding import load_spans, source_of
from actors.policies.batching import windows
from actors.policies.chunking import Chunking, cut
from tests.benchmarks.processes import cpu_by_role
from tests.benchmarks.report import Row, parser, publish
from tests.conftest import System, app_of, config_of, running_system

_DATA = Path(__file__).parents[3] / "shared" / "data" / "retrieval-eval"
_QUICK_DOCUMENTS = 16
_QUICK_STEP = 3  # one window in so many is enough for the baseline's speed
_UPLOADS_AT_ONCE = 4
_POLL_S = 0.1
_RETRIES = 5  # a busy machine makes a request late, not the measurement void
_BARE = "bare encode"


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is to be embedded of some documents, as ingestion will cut it."""

    chunks: Sequence[str]
    pieces: Sequence[str]  # the chunks' windows
    tokens: int  # of the pieces, special tokens included


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What some work took."""

    wall_s: float = 0.0
    cpu_s: float = 0.0

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(wall_s=self.wall_s + other.wall_s, cpu_s=self.cpu_s + other.cpu_s)

    def times(self, factor: float) -> "Spent":
        return Spent(wall_s=self.wall_s * factor, cpu_s=self.cpu_s * factor)


def config() -> dict[str, Any]:
    """configs/local.yaml without the chat model."""
    base = config_of("local", announce_url=None)
    base["applications"].remove(app_of(base, "build_model"))
    return base


def embedder_of(base: dict[str, Any]) -> EmbedderConfig:
    return EmbedderConfig(**app_of(base, "build_retrieval")["args"].get("embedder", {}))


class Bare:
    """The baseline: the library's own `encode`."""

    def __init__(self, config: EmbedderConfig) -> None:
        import torch
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.set_num_threads(config.threads)
        device = None if config.device == "auto" else config.device
        self._model = SentenceTransformer(source_of(config.model), device=device)
        self._model = self._model.to(getattr(torch, config.dtype))
        self._special = self._model.tokenizer.num_special_tokens_to_add()
        self._room = self._model.max_seq_length - self._special
        self._spans = load_spans(config.model)
        self.encode(["warm up"])

    def encode(self, texts: Sequence[str]) -> Spent:
        """Encode texts, for nothing but the time."""
        wall_s, spent_s = time.perf_counter(), time.process_time()
        self._model.encode(list(texts), show_progress_bar=False)
        return Spent(wall_s=time.perf_counter() - wall_s, cpu_s=time.process_time() - spent_s)

    def work(self, texts: Sequence[str]) -> Work:
        """Cut documents as ingestion does."""
        chunks = [text[a:b] for text in texts for a, b in cut(text, Chunking(), self._spans)]
        pieces, tokens = [], 0
        for chunk in chunks:
            spans = self._spans(chunk)
            for first, end in windows(len(spans), self._room, self._room // 8):
                pieces.append(chunk[spans[first][0] : spans[end - 1][1]])
                tokens += end - first + self._special
        return Work(chunks=chunks, pieces=pieces, tokens=tokens)


async def ingest(client: AsyncOpenAI, files: Sequence[Path]) -> float:
    """Upload, attach and wait for files; seconds until the last one is completed."""
    store = await client.vector_stores.create(name="benchmark")
    room = asyncio.Semaphore(_UPLOADS_AT_ONCE)

    async def send(file: Path) -> None:
        async with room:
            uploaded = await client.files.create(file=file, purpose="assistants")
            await client.vector_stores.files.create(vector_store_id=store.id, file_id=uploaded.id)

    started = time.perf_counter()
    await asyncio.gather(*(send(file) for file in files))
    while (counts := (await client.vector_stores.retrieve(store.id)).file_counts).in_progress:
        await asyncio.sleep(_POLL_S)
    elapsed_s = time.perf_counter() - started
    assert counts.completed == len(files), f"not every file was ingested: {counts}"
    return elapsed_s


async def through(system: System, texts: Sequence[str]) -> Spent:
    """Ingest documents, after one that finds everything loaded."""
    client, pid = system.client().with_options(max_retries=_RETRIES), system.process.pid
    with tempfile.TemporaryDirectory(prefix="shoal-") as folder:
        first = Path(folder, "first.md")
        first.write_text("Warm up.")
        files = [Path(folder, f"{number}.md") for number in range(len(texts))]
        for file, text in zip(files, texts, strict=True):
            file.write_text(text)
        await ingest(client, [first])
        before_s = cpu_by_role(pid).total()
        wall_s = await ingest(client, files)
    return Spent(wall_s=wall_s, cpu_s=cpu_by_role(pid).total() - before_s)


def rows(
    documents: int, work: Work, shoal: Spent, bare: Spent, *, truncating_per_s: float, threads: int
) -> list[Row]:
    def rate(name: str, count: int) -> Row:
        return Row(name=name, value=count / shoal.wall_s, unit="1/s",
                   baseline=_BARE, baseline_value=count / bare.wall_s)  # fmt: skip

    return [
        Row(name="ingestion_fraction_of_bare_encode", value=bare.wall_s / shoal.wall_s, unit="of chunks/s"),
        rate("documents_per_s", documents),
        rate("chunks_per_s", len(work.chunks)),
        rate("windows_per_s", len(work.pieces)),
        rate("embedded_tokens_per_s", work.tokens),
        Row(name="cpu_s_per_document", value=shoal.cpu_s / documents, unit="s",
            baseline=_BARE, baseline_value=bare.cpu_s / documents),
        Row(name="truncating_encode_chunks_per_s", value=truncating_per_s, unit="1/s"),
        # A quiet machine gives the baseline all its threads; less, and the wall figures say little.
        Row(name="bare_encode_threads_got", value=bare.cpu_s / bare.wall_s, unit="threads",
            baseline="asked for", baseline_value=threads),
    ]  # fmt: skip


def measure(texts: Sequence[str], *, quick: bool) -> list[Row]:
    """Half of the baseline, the system, the other half; the quick baseline is a part of the work, scaled up."""
    base = config()
    embedder = embedder_of(base)
    bare = Bare(embedder)
    work = bare.work(texts)
    step = _QUICK_STEP if quick else 1
    before, after = (work.pieces[first :: 2 * step] for first in (0, step))
    spent = bare.encode(before)
    some = work.chunks[:: _QUICK_STEP * step]
    truncating_per_s = len(some) / bare.encode(some).wall_s
    with running_system(base) as system:
        shoal = asyncio.run(through(system, texts))
    spent += bare.encode(after)
    spent = spent.times(len(work.pieces) / (len(before) + len(after)))
    return rows(len(texts), work, shoal, spent, truncating_per_s=truncating_per_s, threads=embedder.threads)


def main() -> None:
    options = parser("documents and chunks per second through the whole system, against a bare encode")
    options.add_argument("--data", type=Path, default=_DATA, help="folder with documents.json")
    given = options.parse_args()
    if not (given.data / "documents.json").exists():
        sys.exit(f"skipped: no documents.json in {given.data}; name the folder with --data")
    texts = [one["text"] for one in json.loads((given.data / "documents.json").read_text())]
    if given.quick:
        texts = texts[:: len(texts) // _QUICK_DOCUMENTS][:_QUICK_DOCUMENTS]
    publish(f"Ingestion of {len(texts)} documents", measure(texts, quick=given.quick), given.json)


if __name__ == "__main__":
    main()
