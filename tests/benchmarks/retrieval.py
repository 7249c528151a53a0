"""How good retrieval is, and how fast: nDCG@10 and recall@10 of the product's own parts on a set of questions.

    python -m tests.benchmarks.retrieval [--quick] [--json FILE] [--data DIR]

`DIR` holds `documents.json` (a list of {chunk_link, text} and maybe chunk_heading) and `questions.json` (a list
of {question, correct_chunks}). Every document is one file, cut, embedded and indexed as ingestion does it, with
the default chunking; searches go through `Retriever` (without Ray), a real `chroma run`, the real embedding
model and BM25. Found passages count as their documents. The baseline of quality is `bm25s` over whole documents
with its own tokeniser, that of speed a bare Chroma query. `--quick` cuts without overlap, which halves the work,
and embeds in bfloat16 where the CPU can.
"""

import asyncio
import hashlib
import json
import math
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from actors.embedder import Embedder, EmbedderConfig
from actors.engines.embedding import load_spans
from actors.index.chroma import ChromaIndex
from actors.index.protocol import IndexEntry, Matrix
from actors.ingestion import matrix_of
from actors.local_services import ChromaServer, ChromaServerConfig
from actors.policies.chunking import Chunking, cut
from actors.retrieval_parts import RetrievalParts
from actors.retriever import Retriever, RetrieverConfig
from actors.stores.catalog_records import StoreFileRecord
from actors.stores.config import StorageConfig
from actors.stores.documents import DocumentStore, DocumentVersion
from actors.types import RetrievalQuery, RetrievalResult
from tests.benchmarks.report import Row, parser, publish

_DATA = Path(__file__).parents[3] / "shared" / "data" / "retrieval-eval"
_TENANT, _STORE = "benchmark", "vs_benchmark"
Spans = list[tuple[int, int]]
_AT = 10  # nDCG and recall are taken at this rank
_PASSAGES = 50  # asked for, since several may be of one document
_BATCH = 32  # chunks per call of the embedder
_DOCUMENTS_AT_ONCE = 8


@dataclass(frozen=True)
class Question:
    """A question and the documents that answer it."""

    text: str
    relevant: frozenset[str]


class Catalog:
    """A catalog of one store in which everything is published."""

    def __init__(self, records: Sequence[StoreFileRecord]) -> None:
        self._records = tuple(records)

    async def generation(self, tenant: str, vector_store_id: str) -> int:
        return 1

    async def published(self, tenant: str, vector_store_id: str) -> tuple[int, tuple[StoreFileRecord, ...]]:
        return 1, self._records


@contextmanager
def chroma() -> Iterator[StorageConfig]:
    """A Chroma server with an empty folder."""
    with tempfile.TemporaryDirectory(prefix="shoal-") as folder:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        storage = StorageConfig(data_dir=Path(folder), chroma_port=port)
        server = ChromaServer(ChromaServerConfig(storage=storage))
        try:
            yield storage
        finally:
            server.stop()


class Ingest:
    """Writes documents as ingestion does, several at a time."""

    def __init__(
        self, embedder: Embedder, index: ChromaIndex, documents: DocumentStore, cut_up: Callable[[str], Spans]
    ) -> None:
        self._embedder, self._index, self._documents, self._cut_up = embedder, index, documents, cut_up
        self._room = asyncio.Semaphore(_DOCUMENTS_AT_ONCE)

    async def all(self, texts: dict[str, str]) -> Catalog:
        return Catalog(await asyncio.gather(*(self._one(*named) for named in texts.items())))

    async def _one(self, name: str, text: str) -> StoreFileRecord:
        async with self._room:
            version = await self._version(name, text)
            await self._documents.put_version(_TENANT, version)
            entries = [
                IndexEntry(
                    chunk_id=one, file_id=version.file_id, filename=name, text=chunk.text, start=chunk.start
                )
                for one, chunk in version.entry_ids
            ]
            await self._index.upsert(_STORE, entries, matrix_of(version))
        return StoreFileRecord(
            file_id=version.file_id,
            vector_store_id=_STORE,
            filename=name,
            created_at=0,
            revision="r",
            status="completed",
            version="v1",
        )

    async def _version(self, name: str, text: str) -> DocumentVersion:
        spans = self._cut_up(text)
        found = [
            await self._embedder.embed(
                [text[start:end] for start, end in spans[at : at + _BATCH]], pool=False
            )
            for at in range(0, len(spans), _BATCH)
        ]
        return DocumentVersion(
            vector_store_id=_STORE,
            file_id=f"file-{hashlib.sha256(name.encode()).hexdigest()[:16]}",
            filename=name,
            version="v1",
            text=text,
            spans=tuple(spans),
            embeddings=b"".join(one.vectors for one in found),
            rows=tuple(count for one in found for count in one.rows),
            dimensions=found[0].dimensions,
            embedding_model="benchmark",
        )


def quality(found: Sequence[Sequence[str]], questions: Sequence[Question]) -> tuple[float, float]:
    """Mean nDCG and recall of rankings of document names, with binary relevance."""
    ndcgs, recalls = [], []
    for names, question in zip(found, questions, strict=True):
        top = list(dict.fromkeys(names))[:_AT]
        gain = sum(1 / math.log2(rank + 2) for rank, name in enumerate(top) if name in question.relevant)
        best = sum(1 / math.log2(rank + 2) for rank in range(min(_AT, len(question.relevant))))
        ndcgs.append(gain / best)
        recalls.append(len(question.relevant.intersection(top)) / len(question.relevant))
    return statistics.mean(ndcgs), statistics.mean(recalls)


def plain_bm25(texts: dict[str, str], questions: Sequence[Question]) -> tuple[float, float]:
    """The baseline: whole documents, the library's tokeniser with English stop words."""
    import bm25s

    names = np.array(list(texts))
    index = bm25s.BM25()
    index.index(
        bm25s.tokenize(list(texts.values()), stopwords="en", show_progress=False), show_progress=False
    )
    queries = bm25s.tokenize([one.text for one in questions], stopwords="en", show_progress=False)
    found, _ = index.retrieve(queries, k=min(_AT, len(names)), show_progress=False)
    return quality([list(names[row]) for row in found], questions)


async def measure(
    texts: dict[str, str],
    questions: Sequence[Question],
    config: EmbedderConfig,
    chunking: Chunking,
    storage: StorageConfig,
) -> list[Row]:
    """Ingest, search with every ranker, and make rows of it."""
    embedder = Embedder(config)
    index = ChromaIndex(storage.effective_chroma_url)
    documents = DocumentStore(storage.effective_documents_url)
    started = time.monotonic()
    cut_up = partial(cut, chunking=chunking, tokenize=load_spans(config.model))
    catalog = await Ingest(embedder, index, documents, cut_up).all(texts)
    print(f"{len(texts)} documents ingested in {time.monotonic() - started:.1f} s", file=sys.stderr)

    asked: dict[str, Matrix] = {}

    async def embed(text: str, _timeout_s: float) -> Matrix:
        if text not in asked:
            found = await embedder.embed([text], "query")
            asked[text] = np.frombuffer(found.vectors, dtype="<f4").reshape(1, found.dimensions)
        return asked[text]

    parts = RetrievalParts(embed=embed, index=index, catalog=catalog, documents=documents)
    retriever = Retriever(RetrieverConfig(deadline_s=30, storage=storage), parts)
    await search(retriever, questions[0], "auto", _AT)  # builds and loads what is loaded once
    rows: list[Row] = []
    plain = plain_bm25(texts, questions)
    for name, ranker in (("hybrid", "auto"), ("dense", "dense"), ("bm25", "bm25")):
        results = [await search(retriever, question, ranker, _PASSAGES) for question in questions]
        assert not any(result.degraded for result in results), "a part did not answer"
        found = quality([[one.filename for one in result.passages] for result in results], questions)
        for metric, value, baseline in zip(("ndcg10", "recall10"), found, plain, strict=True):
            rows.append(
                Row(name=f"{name}_{metric}", value=value, unit="", baseline="bm25s", baseline_value=baseline)
            )
    bare_ms = await bare_chroma(index, list(asked.values()))
    asked.clear()
    rows += latency([await search(retriever, question, "auto", _AT) for question in questions], bare_ms)
    await index.close()
    return rows


async def search(retriever: Retriever, question: Question, ranker: str, passages: int) -> RetrievalResult:
    query = RetrievalQuery(
        tenant=_TENANT,
        vector_store_ids=(_STORE,),
        text=question.text,
        max_num_results=passages,
        ranker=ranker,  # type: ignore[arg-type]
    )
    return await retriever.search(query)


def latency(results: Sequence[RetrievalResult], bare_ms: Sequence[float]) -> list[Row]:
    """p50 and p99 of each stage of hybrid searches, and of all of them together."""
    spent_ms = {
        stage: [1e3 * result.stage_s[stage] for result in results]
        for stage in ("embed", "retrieve", "rerank")
    }
    spent_ms["search"] = [sum(stages) for stages in zip(*spent_ms.values(), strict=True)]
    return [
        Row(
            name=f"{stage}_p{percent}_ms",
            value=float(np.percentile(values, percent)),
            unit="ms",
            baseline="bare Chroma" if stage == "retrieve" else None,
            baseline_value=float(np.percentile(bare_ms, percent)) if stage == "retrieve" else None,
        )
        for stage, values in spent_ms.items()
        for percent in (50, 99)
    ]


async def bare_chroma(index: ChromaIndex, vectors: Sequence[Matrix]) -> list[float]:
    """Milliseconds of the same nearest-neighbour queries, asked of the index alone."""
    spent_ms = []
    for vector in vectors:
        started = time.perf_counter()
        await index.query(_STORE, vector, RetrieverConfig().candidates)
        spent_ms.append(1e3 * (time.perf_counter() - started))
    return spent_ms


def load(folder: Path) -> tuple[dict[str, str], list[Question]]:
    """Documents by name, and questions that have an answer among them."""
    texts = {
        one["chunk_link"]: "\n\n".join(filter(None, (one.get("chunk_heading"), one["text"])))
        for one in json.loads((folder / "documents.json").read_text())
    }
    questions = [
        Question(one["question"], frozenset(one["correct_chunks"]).intersection(texts))
        for one in json.loads((folder / "questions.json").read_text())
    ]
    return texts, [question for question in questions if question.relevant]


def fast_dtype() -> str:
    """bfloat16 where the CPU multiplies it."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


def main() -> None:
    options = parser("nDCG@10, recall@10 and latency of retrieval")
    options.add_argument(
        "--data", type=Path, default=_DATA, help="folder with documents.json and questions.json"
    )
    options.add_argument("--model", default=EmbedderConfig().model, help="embedding model")
    given = options.parse_args()
    if not (given.data / "documents.json").exists():
        sys.exit(f"skipped: no documents.json in {given.data}; name the folder with --data")
    texts, questions = load(given.data)
    config = EmbedderConfig(
        model=given.model,
        dtype=fast_dtype() if given.quick else "float32",
        threads=os.cpu_count() or 1,
        max_batch_tokens=4096,
    )
    chunking = Chunking(chunk_overlap_tokens=0) if given.quick else Chunking()
    with chroma() as storage:
        rows = asyncio.run(measure(texts, questions, config, chunking, storage))
    publish(f"Retrieval: {len(texts)} documents, {len(questions)} questions", rows, given.json)


if __name__ == "__main__":
    main()
