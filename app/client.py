"""`ShoalClient`: Shoal for Python code inside the Ray cluster, without HTTP.

Typed and async, over a Serve handle to the gateway (`actors.handles.gateway`). Keys, limits, queueing and
deadlines are the same as over HTTP; errors are those of `actors.errors`. Code outside the cluster uses any
OpenAI client.

    client = ShoalClient(api_key=...)
    answer = await client.chat([Message(role="user", content="Why do fish swim in shoals?")], "my-model")
    async with client.stream_chat([...], "my-model") as stream:
        async for text in stream:
            print(text, end="", flush=True)
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from actors.errors import Conflict, DeadlineExceeded, InvalidRequest
from actors.handles.gateway import GatewayClient
from actors.stores.catalog_records import Attributes, StoreFileRecord, VectorStoreRecord
from actors.types import (
    GenerationCall,
    GenerationRequest,
    Message,
    ModelCard,
    PriorityClass,
    ResponseFormat,
    RetrievalOptions,
    RetrievalQuery,
    RetrievalResult,
    SamplingParams,
    Tool,
    ToolChoice,
)
from app.client_answers import ChatAnswer, ChatStream

_POLL_S = (0.1, 2.0)  # first and longest pause while a document is ingested
_PLAIN = SamplingParams()
_AUTO = ToolChoice()
_TEXT = ResponseFormat()


class ShoalClient:
    """One key's view of a Shoal; cheap to keep, safe to share among tasks.

    Args:
        api_key: None where auth.mode is open.
        app_name: the gateway's Serve application.
        timeout_s: deadline of a call that names none.
    """

    def __init__(
        self, api_key: str | None = None, *, app_name: str = "gateway", timeout_s: float = 300.0
    ) -> None:
        self._gateway = GatewayClient(app_name, api_key, timeout_s)
        self._timeout_s = timeout_s

    def stream_chat(  # noqa: PLR0913  OpenAI's parameters, each with a default
        self,
        messages: Sequence[Message],
        model: str,
        *,
        sampling: SamplingParams = _PLAIN,
        tools: Sequence[Tool] = (),
        tool_choice: ToolChoice = _AUTO,
        response_format: ResponseFormat = _TEXT,
        retrieval: RetrievalOptions | None = None,
        service_tier: PriorityClass | None = None,
        timeout_s: float | None = None,
    ) -> ChatStream:
        """Answer a conversation, piece by piece.

        Args:
            messages: the conversation.
            model: a name that `models` gives.
            sampling: how tokens are drawn, and how many.
            tools: functions that the model may call.
            tool_choice: which of them it may, or must.
            response_format: for JSON.
            retrieval: answer from vector stores, with citations.
            service_tier: a lower class than the key's.
            timeout_s: until the last token.
        """
        request = GenerationRequest(
            request_id=_request_id("chatcmpl"),
            messages=tuple(messages),
            sampling=sampling,
            tools=tuple(tools),
            tool_choice=tool_choice,
            response_format=response_format,
        )
        return self._stream(model, request, timeout_s, retrieval, service_tier)

    async def chat(self, messages: Sequence[Message], model: str, **options: Any) -> ChatAnswer:
        """Answer a conversation.

        Args:
            messages: the conversation.
            model: a name that `models` gives.
            options: those of `stream_chat`.

        Raises:
            ShoalError: there is no complete answer.
        """
        async with self.stream_chat(messages, model, **options) as stream:
            return await stream.answer()

    async def complete(
        self,
        prompt: str,
        model: str,
        *,
        sampling: SamplingParams = _PLAIN,
        echo: bool = False,
        timeout_s: float | None = None,
    ) -> ChatAnswer:
        """Go on with a text, without a chat template.

        Raises:
            ShoalError: there is no complete answer.
        """
        request = GenerationRequest(
            request_id=_request_id("cmpl"), prompt=prompt, sampling=sampling, echo=echo
        )
        async with self._stream(model, request, timeout_s) as stream:
            return await stream.answer()

    async def embed(
        self, texts: Sequence[str], *, model: str | None = None, dimensions: int | None = None
    ) -> npt.NDArray[np.float32]:
        """Vectors of length 1, one row per text.

        Args:
            texts: what to embed.
            model: None: the system's own embedding model.
            dimensions: fewer than the model's, where it allows that.

        Raises:
            ShoalError: a text or the model is not accepted, or the embedder is down.
        """
        found = await self._gateway.embed(texts, model, dimensions)
        return np.frombuffer(found.vectors, dtype="<f4").reshape(len(texts), found.dimensions)

    async def search(  # noqa: PLR0913  OpenAI's parameters, each with a default
        self,
        store_id: str,
        query: str,
        *,
        max_num_results: int = 10,
        score_threshold: float = 0.0,
        filters: Mapping[str, Any] | None = None,
        ranker: Literal["auto", "dense", "bm25"] = "auto",
    ) -> RetrievalResult:
        """Passages of a vector store, best first.

        Raises:
            NotFound: there is no such vector store.
            ShoalError: the search failed.
        """
        return await self._gateway.search(
            RetrievalQuery(
                tenant="",  # the gateway's to set, from the key
                vector_store_ids=(store_id,),
                text=query,
                max_num_results=max_num_results,
                score_threshold=score_threshold,
                filters=filters,
                ranker=ranker,
            )
        )

    async def models(self) -> list[ModelCard]:
        """What can be named as `model`."""
        return await self._gateway.models()

    async def create_store(self, name: str) -> VectorStoreRecord:
        """Make an empty vector store; its `id` is what the other calls take."""
        return await self._gateway.create_store(name)

    async def add_document(
        self, store_id: str, filename: str, data: bytes, attributes: Attributes | None = None
    ) -> StoreFileRecord:
        """Upload a document into a vector store; `wait_until_ingested` tells when it can be found.

        Args:
            store_id: the vector store.
            filename: its extension tells the type.
            data: the whole file.
            attributes: for filters.

        Raises:
            ShoalError: it was not stored.
        """
        return await self._gateway.add_document(store_id, filename, data, attributes or {})

    async def wait_until_ingested(
        self, store_id: str, file_id: str, timeout_s: float = 600.0
    ) -> StoreFileRecord:
        """Return when searches find the document.

        Raises:
            InvalidRequest: it cannot be ingested; the message says why.
            Conflict: its ingestion was cancelled.
            DeadlineExceeded: it takes longer; ingestion goes on.
        """
        pause_s = _POLL_S[0]
        ends_at = asyncio.get_running_loop().time() + timeout_s
        while True:
            file = await self._gateway.store_file(store_id, file_id)
            if file.status == "completed":
                return file
            if file.status == "failed":
                raise InvalidRequest(file.last_error.message if file.last_error else "ingestion failed")
            if file.status == "cancelled":
                raise Conflict("the ingestion of this document was cancelled")
            if asyncio.get_running_loop().time() + pause_s > ends_at:
                raise DeadlineExceeded(
                    f"the document is not ingested after {timeout_s:g} s; its progress is {file.progress:.0%}"
                )
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 1.5, _POLL_S[1])

    def _stream(
        self,
        model: str,
        request: GenerationRequest,
        timeout_s: float | None,
        retrieval: RetrievalOptions | None = None,
        service_tier: PriorityClass | None = None,
    ) -> ChatStream:
        limit_s = timeout_s or self._timeout_s
        call = GenerationCall(
            model=model,
            request=request,
            retrieval=retrieval,
            timeout_s=limit_s,
            service_tier=service_tier,
        )
        return ChatStream(self._gateway, call, limit_s)


def _request_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"
