"""The embedding model as the gateway, the retriever and ingestion call it.

Large calls are cut into parts: a part travels by value (a third of the cost by reference), which gRPC caps at
4 MB, and parts spread over the replicas. What the model does is `actors.embedder`.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any

from actors.engines.embedding import EmbeddingKind, EmbeddingModelInfo
from actors.errors import InvalidRequest, ShoalError
from actors.handles.call import answered, deployment_handle, result
from actors.types import Embeddings

EMBEDDER_DEPLOYMENT = "Embedder"
_PART_BYTES = 500_000  # of text; its vectors come to less than 4 MB
_PART_INPUTS = 64
_PARTS_AT_ONCE = 4
_INPUT_BYTES = 1_000_000
_BYTES_PER_ID = 5
_REPLICA_WAIT_S = 2.0  # for a replica to take a call: with one that lives it takes milliseconds
_PLACE = re.compile(r"^input\[(\d+)\]$")

Inputs = Sequence[str] | Sequence[Sequence[int]]


class EmbedderClient:
    """The embedder of one retrieval application.

    Args:
        app_name: its Serve application.
    """

    def __init__(self, app_name: str = "retrieval") -> None:
        self._app_name = app_name
        self._handles: dict[str, Any] = {}  # by method; made in the event loop that uses them

    async def embed(
        self,
        inputs: Inputs,
        *,
        timeout_s: float,
        kind: EmbeddingKind = "passage",
        dimensions: int | None = None,
        pool: bool = True,
    ) -> Embeddings:
        """Embed texts or token ids, in the order given; see `actors.embedder.Embedder.embed`.

        Args:
            inputs: texts, or lists of the model's token ids.
            timeout_s: for all of them.
            kind: "query" goes first.
            dimensions: must be the model's, if given.
            pool: one vector per text, else one per window with `rows` to tell them apart.

        Raises:
            InvalidRequest: an input or `dimensions` is wrong; `param` names the input.
            Overloaded: too much waits; `retry_after_s` says how long.
            Unavailable, DeadlineExceeded: no embedder could answer (in time).
        """
        deadline = time.monotonic() + timeout_s
        room = asyncio.Semaphore(_PARTS_AT_ONCE)

        async def one(part: slice) -> Embeddings:
            async with room:
                call = self._method("answer").remote(inputs[part], kind, dimensions=dimensions, pool=pool)
                left_s = max(deadline - time.monotonic(), 0.001)
                try:
                    found: Embeddings = await answered(
                        call, taken_s=_REPLICA_WAIT_S, timeout_s=left_s, what="embedder"
                    )
                except InvalidRequest as error:
                    raise _moved(error, part.start) from None
                return found

        return _joined(await _all([one(part) for part in _parts(inputs)]))

    async def info(self, *, timeout_s: float) -> EmbeddingModelInfo:
        """What the model is.

        Raises:
            Unavailable, DeadlineExceeded: no embedder could answer (in time).
        """
        found: EmbeddingModelInfo = await result(
            self._method("info").remote(), timeout_s=timeout_s, what="embedder"
        )
        return found

    def _method(self, name: str) -> Any:
        if not self._handles:
            handle = deployment_handle(EMBEDDER_DEPLOYMENT, self._app_name)
            self._handles = {
                "answer": handle.options(method_name="answer", stream=True, _by_reference=False),
                "info": handle.options(method_name="info", _by_reference=False),
            }
        return self._handles[name]


def _parts(inputs: Inputs) -> Iterator[slice]:
    start = used = 0
    for index, item in enumerate(inputs):
        size = len(item.encode()) if isinstance(item, str) else _BYTES_PER_ID * len(item)
        if size > _INPUT_BYTES:
            raise InvalidRequest(f"an input may have at most {_INPUT_BYTES:,} bytes", f"input[{index}]")
        if index > start and (used + size > _PART_BYTES or index - start == _PART_INPUTS):
            yield slice(start, index)
            start, used = index, 0
        used += size
    yield slice(start, len(inputs))


async def _all(parts: Sequence[Coroutine[Any, Any, Embeddings]]) -> list[Embeddings]:
    """Await all parts; the first failure cancels the rest."""
    tasks = [asyncio.create_task(part) for part in parts]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _joined(parts: Sequence[Embeddings]) -> Embeddings:
    if len(parts) == 1:
        return parts[0]
    return Embeddings(
        vectors=b"".join(part.vectors for part in parts),
        dimensions=parts[0].dimensions,
        tokens=sum(part.tokens for part in parts),
        rows=tuple(count for part in parts for count in part.rows),
    )


def _moved(error: InvalidRequest, by: int) -> ShoalError:
    """The error with the input's place in the whole call instead of in its part."""
    place = _PLACE.match(error.param or "")
    param = f"input[{int(place[1]) + by}]" if place else error.param
    return type(error)(error.message, param, error.retry_after_s, error.headers)
