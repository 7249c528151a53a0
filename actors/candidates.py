"""The two indexes side by side: what each proposes for a question, and which of them did not answer.

`actors.retrieval` fuses what comes back. Each call goes through `actors.guard`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine, Sequence
from dataclasses import replace
from typing import Any

from actors.errors import DeadlineExceeded, NotFound, Unavailable
from actors.guard import Guard, LeftOut
from actors.index.bm25 import FileKey
from actors.index.bm25_cache import Bm25Cache, Wanted
from actors.index.protocol import IndexEntry, IndexHit, Matrix
from actors.policies.breaker import BreakerPolicy
from actors.policies.chunking import chunk_of
from actors.retrieval_parts import Found, RetrievalConfig, RetrievalParts, Scope, Search
from actors.stores.published import PublishedView

_ONCE_MORE = 4  # times as many entries, when they came from too few chunks
_GRACE_S = 0.05  # parts keep their own time; this much later the search stops waiting for them


class Candidates:
    """Asks the indexes.

    Args:
        config: see `RetrievalConfig`.
        parts: what is asked.
    """

    def __init__(self, config: RetrievalConfig, parts: RetrievalParts) -> None:
        self._config = config
        self._parts = parts
        self._bm25 = Bm25Cache(config.max_bm25_bytes)
        policy = BreakerPolicy(
            failures_to_open=config.failures_to_open, open_s=config.open_s, max_open_s=config.max_open_s
        )
        # Half of what a part gets when the caller leaves the deadline to us.
        self._guard = Guard(policy, fair_timeout_s=config.deadline_s * (1 - config.embed_share) / 2)

    async def rankings(self, search: Search, scopes: Sequence[Scope]) -> dict[str, list[Found]]:
        """What each index found, best first, by its name ("dense", "bm25").

        What did not answer is in `search.left_out` afterwards, also when it is one store of several.

        Raises:
            InvalidRequest: a part refused what it was asked.
            DeadlineExceeded: nothing answered in time.
            Unavailable: nothing answered.
        """
        started: dict[str, Coroutine[Any, Any, list[Found]]] = {}
        if search.query.ranker != "bm25":
            started["dense"] = self._dense(search, scopes)
        if search.query.ranker != "dense":
            started["bm25"] = self._each(search, [self._words_in(search, scope) for scope in scopes])
        tasks = {name: asyncio.create_task(work) for name, work in started.items()}
        try:
            await asyncio.wait(tasks.values(), timeout=search.left_s() + _GRACE_S)
        finally:
            for task in tasks.values():
                task.cancel()
        answers = {name: _answer(name, task) for name, task in tasks.items()}
        search.left_out += [answer for answer in answers.values() if isinstance(answer, LeftOut)]
        found: dict[str, list[Found]] = {}
        for name, answer in answers.items():
            if isinstance(answer, list):
                found[name] = answer
            elif not isinstance(answer, LeftOut):
                raise answer
        if not found:
            raise _nothing_answered(search)
        return found

    # --- by meaning ----------------------------------------------------------------------------------

    async def _dense(self, search: Search, scopes: Sequence[Scope]) -> list[Found]:
        before_s, text = search.elapsed_s(), search.query.text
        share_s = min(search.left_s(), self._config.embed_share * search.timeout_s)
        try:
            vector = await self._guard.call(
                "embed", lambda: self._parts.embed(text, share_s), timeout_s=share_s
            )
        finally:
            search.embed_s = search.elapsed_s() - before_s
        return await self._each(search, [self._dense_in(search, scope, vector) for scope in scopes])

    async def _dense_in(self, search: Search, scope: Scope, vector: Matrix) -> list[Found]:
        k = self._config.candidates if search.query.filters is None else self._config.filtered_candidates
        store = scope.view.vector_store_id
        hits, entries = await self._nearest(search, store, vector, k)
        if entries == k and len(hits) < search.query.max_num_results:
            # Windows of few chunks took all the places.
            hits, _ = await self._nearest(search, store, vector, _ONCE_MORE * k)
        return [Found(scope, hit) for hit in hits]

    async def _nearest(
        self, search: Search, store: str, vector: Matrix, k: int
    ) -> tuple[list[IndexHit], int]:
        """Chunks, each with the score of its best window, and how many entries the index gave for them."""
        hits = await self._guard.call(
            "vector",
            lambda: self._parts.index.query(store, vector, k),
            timeout_s=search.left_s(),
            circuit=store,
        )
        best: dict[str, IndexHit] = {}
        for hit in hits:  # best first
            chunk = chunk_of(hit.entry.chunk_id)
            best.setdefault(chunk, IndexHit(entry=replace(hit.entry, chunk_id=chunk), score=hit.score))
        return list(best.values()), len(hits)

    # --- by words ------------------------------------------------------------------------------------

    async def _words_in(self, search: Search, scope: Scope) -> list[Found]:
        view = scope.view

        async def read(key: FileKey) -> Sequence[IndexEntry]:
            return await self._entries(view, key)

        async def work() -> list[IndexHit]:
            wanted = Wanted(view.generation, view.versions)
            index = await self._bm25.get(f"{view.tenant}/{view.vector_store_id}", wanted, read)
            search.bm25[view.vector_store_id] = index
            return await asyncio.to_thread(
                index.search, search.query.text, self._config.candidates, scope.versions
            )

        hits = await self._guard.call("bm25", work, timeout_s=search.left_s(), circuit=view.vector_store_id)
        return [Found(scope, hit) for hit in hits]

    async def _entries(self, view: PublishedView, key: FileKey) -> Sequence[IndexEntry]:
        try:
            document = await self._parts.documents.get_version(view.tenant, view.vector_store_id, *key)
        except NotFound:
            return ()  # replaced or removed meanwhile: the next generation tells
        return [
            IndexEntry(
                chunk_id=chunk.chunk_id,
                file_id=key[0],
                filename=document.filename,
                text=chunk.text,
                start=chunk.start,
            )
            for chunk in document.chunks
        ]

    # --- over several stores -------------------------------------------------------------------------

    async def _each(self, search: Search, stores: Sequence[Awaitable[list[Found]]]) -> list[Found]:
        """One ranking over several stores: scores of one index can be compared across them."""
        answers = await asyncio.gather(*stores, return_exceptions=True)
        left_out = [answer for answer in answers if isinstance(answer, LeftOut)]
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, LeftOut):
                raise answer
        if left_out and len(left_out) == len(answers):
            raise left_out[0]
        search.left_out += left_out
        found = [one for answer in answers if isinstance(answer, list) for one in answer]
        return found if len(answers) == 1 else sorted(found, key=lambda one: -one.hit.score)


def _answer(name: str, task: asyncio.Task[list[Found]]) -> list[Found] | BaseException:
    if not task.done():
        return LeftOut("vector" if name == "dense" else name, "timeout")
    return task.exception() or task.result()


def _nothing_answered(search: Search) -> DeadlineExceeded | Unavailable:
    if all(left_out.reason == "timeout" for left_out in search.left_out):
        return DeadlineExceeded(f"no index answered within {search.timeout_s:.2g} s")
    retry_after_s = min(left_out.retry_after_s for left_out in search.left_out)
    return Unavailable("retrieval is not available at the moment", retry_after_s=max(retry_after_s, 0.1))
