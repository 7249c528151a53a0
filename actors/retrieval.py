"""What a search does: by meaning and by words, under a deadline, with whatever answers.

The inside of `actors.retriever.Retriever`, without Ray. The order of a search: what is published → (embed the
question → vector index) beside BM25 → fuse → drop what is not current or filtered out → the best. A part that
fails or is late is left out and named in `degraded`; only when nothing answered does the search fail.

Scores are 0 to 1. Ranker "auto", fused: 1 is first in both rankings, and what only one of them knows has at
most 0.5 (`actors.policies.fusion`). Ranker "dense": the cosine. Ranker "bm25": the share of the query's
information that the passage answers (`actors.index.bm25`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from actors.candidates import Candidates
from actors.errors import InvalidRequest
from actors.index.bm25 import FileKey
from actors.policies.filters import parse_filter
from actors.policies.fusion import Ranking, fuse
from actors.retrieval_parts import Found, RetrievalConfig, RetrievalParts, Scope, Search
from actors.stores.published import PublishedFiles, PublishedView
from actors.types import Passage, RetrievalQuery, RetrievalResult

_MOST_RESULTS = 50
_MOST_STORES = 20


class Retrieval:
    """Searches.

    Args:
        config: see `RetrievalConfig`.
        parts: what is asked.
    """

    def __init__(self, config: RetrievalConfig, parts: RetrievalParts) -> None:
        self._config = config
        self._published = PublishedFiles(parts.catalog)
        self._candidates = Candidates(config, parts)

    async def search(self, query: RetrievalQuery, timeout_s: float | None = None) -> RetrievalResult:
        """Search one or more vector stores.

        Args:
            query: the search.
            timeout_s: for all of it, if shorter than the configured deadline.

        Raises:
            NotFound: there is no such vector store.
            InvalidRequest: the query, a filter or a bound is wrong.
            DeadlineExceeded: nothing answered in time.
            Unavailable: nothing answered.
        """
        _check(query)
        deadline_s = self._config.deadline_s
        search = Search(query, deadline_s if timeout_s is None else min(timeout_s, deadline_s))
        scopes = await self._scopes(search)
        rankings = await self._candidates.rankings(search, scopes)
        retrieved_s = search.elapsed_s()
        passages = self._best(search, rankings)
        degraded = [str(left_out) for left_out in search.left_out]
        if any(scope.view.last_known for scope in scopes):
            degraded.append("catalog=unavailable")
        return RetrievalResult(
            passages=passages,
            degraded=",".join(dict.fromkeys(degraded)),
            stage_s={
                "embed": search.embed_s,
                "retrieve": retrieved_s - search.embed_s,
                "rerank": search.elapsed_s() - retrieved_s,
            },
        )

    async def _scopes(self, search: Search) -> list[Scope]:
        query = search.query
        views = await asyncio.gather(
            *(
                self._published.view(query.tenant, store, search.left_s())
                for store in dict.fromkeys(query.vector_store_ids)
            )
        )
        return [Scope(view, _passing(view, query.filters)) for view in views]

    def _best(self, search: Search, rankings: Mapping[str, list[Found]]) -> tuple[Passage, ...]:
        query = search.query
        current = {name: self._current(search, found) for name, found in rankings.items()}
        known = {one.hit.entry.chunk_id: one for found in current.values() for one in found}
        passages = (_passage(known[chunk_id], score) for chunk_id, score in self._scored(query, current))
        enough = [one for one in passages if one.score >= query.score_threshold]
        return tuple(enough[: query.max_num_results])

    def _current(self, search: Search, found: Sequence[Found]) -> list[Found]:
        """What is published and passes the filter."""
        indexes = search.bm25
        kept = [one for one in found if one.scope.holds(one.hit, indexes.get(one.scope.view.vector_store_id))]
        return kept[: self._config.candidates]

    def _scored(self, query: RetrievalQuery, rankings: Mapping[str, list[Found]]) -> list[tuple[str, float]]:
        if query.ranker != "auto":
            return [
                (one.hit.entry.chunk_id, min(max(one.hit.score, 0.0), 1.0))
                for found in rankings.values()
                for one in found
            ]
        weights = {"dense": self._config.dense_weight, "bm25": self._config.bm25_weight}
        return fuse(
            [
                Ranking(ids=[one.hit.entry.chunk_id for one in found], weight=weights[name])
                for name, found in rankings.items()
            ]
        )


def _check(query: RetrievalQuery) -> None:
    if not query.text.strip():
        raise InvalidRequest("the query must not be blank", "query")
    if not 1 <= len(query.vector_store_ids) <= _MOST_STORES:
        raise InvalidRequest(f"1 to {_MOST_STORES} vector stores can be searched", "vector_store_ids")
    if not 1 <= query.max_num_results <= _MOST_RESULTS:
        raise InvalidRequest(f"max_num_results must be between 1 and {_MOST_RESULTS}", "max_num_results")
    if not 0 <= query.score_threshold <= 1:
        raise InvalidRequest("score_threshold must be between 0 and 1", "ranking_options.score_threshold")


def _passing(view: PublishedView, filters: Mapping[str, Any] | None) -> Collection[FileKey]:
    passes = parse_filter(filters)
    if filters is None:
        return view.versions
    return {key for key, record in view.versions.items() if passes(record.attributes)}


def _passage(found: Found, score: float) -> Passage:
    entry, view = found.hit.entry, found.scope.view
    record = view.files[entry.file_id]
    return Passage(
        chunk_id=entry.chunk_id,
        file_id=entry.file_id,
        filename=record.filename,
        vector_store_id=view.vector_store_id,
        text=entry.text,
        score=score,
        start=entry.start,
        attributes=record.attributes,
    )
