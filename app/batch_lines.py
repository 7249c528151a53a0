"""Answers the lines of batches with the same wire models as the HTTP routes: what `actors.batcher` calls a `LineApp`.

`app.main` hands `BatchLines` to the job runner, which makes one: the runner lives in `actors` and knows no wire format.
Streams make no sense in a file and are refused.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import msgspec
from pydantic import BaseModel, ValidationError

from actors.answering import Answering, EmbeddingCalls
from actors.errors import InvalidRequest, ModelNotFound, ShoalError
from actors.handles.model import ModelStream
from actors.policies.batches import BatchTask
from actors.policies.prompting import question_of
from actors.policies.responses import Began, Fact, Said, Searched, finished
from actors.stores.keys import AuthenticatedKey
from actors.telemetry import StageClock
from actors.types import GenerationCall, Principal
from app.schemas.bad_input import error_object, invalid_request
from app.schemas.chat import ChatRequest
from app.schemas.chat_answers import AnswerShape, ChatAnswer
from app.schemas.common import new_id
from app.schemas.completion_answers import CompletionAnswer
from app.schemas.completions import CompletionRequest
from app.schemas.embeddings import EmbeddingsRequest
from app.schemas.response_events import ResponseReader, head_of
from app.schemas.responses import ResponsesRequest

M = TypeVar("M", bound=BaseModel)


class BatchLines:
    """Answers lines.

    Args:
        answering: makes answers.
        embeddings: makes vectors.
    """

    def __init__(self, answering: Answering, embeddings: EmbeddingCalls) -> None:
        self._answering, self._embeddings = answering, embeddings

    async def answer(self, task: BatchTask, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """The body of the answer to one line.

        Raises:
            ShoalError: it cannot be answered, or not now.
        """
        if body.get("stream") or body.get("background"):
            raise InvalidRequest("a line of a batch can neither stream nor run in the background", "stream")
        make = {
            "/v1/chat/completions": self._chat,
            "/v1/completions": self._completion,
            "/v1/embeddings": self._embedding,
            "/v1/responses": self._response,
        }[task.endpoint]
        return await make(task, body)

    def error_body(self, error: ShoalError) -> Mapping[str, Any]:
        """OpenAI's error object."""
        return error_object(error)

    async def _chat(self, task: BatchTask, body: Mapping[str, Any]) -> Mapping[str, Any]:
        asked = _parsed(ChatRequest, body)
        call = asked.to_call(timeout_s=None, request_id=new_id("chatcmpl"))
        stream = await self._generate(task, call)
        shape = AnswerShape(
            id=call.request.request_id,
            model=asked.model,
            choices=call.request.sampling.n,
            service_tier="flex",
            logprobs=call.request.sampling.logprobs,
            passages=tuple(stream.passages),
        )
        answer = ChatAnswer(shape)
        await _collect(stream, answer)
        return answer.body()

    async def _completion(self, task: BatchTask, body: Mapping[str, Any]) -> Mapping[str, Any]:
        asked = _parsed(CompletionRequest, body)
        calls = asked.to_calls(timeout_s=None, request_id=new_id("cmpl"))
        if len(calls) > 1:
            raise InvalidRequest("a line of a batch has one prompt: write a line for each", "prompt")
        shape = AnswerShape(
            id=calls[0].request.request_id,
            model=asked.model,
            choices=calls[0].request.sampling.n,
            service_tier="flex",
            logprobs=asked.logprobs is not None,
        )
        answer = CompletionAnswer(shape)
        await _collect(await self._generate(task, calls[0]), answer)
        return answer.body()

    async def _embedding(self, task: BatchTask, body: Mapping[str, Any]) -> Mapping[str, Any]:
        asked = _parsed(EmbeddingsRequest, body)
        known = task.embedding_model
        if task.aliases.get(asked.model, asked.model) != known or not known:
            raise ModelNotFound(
                f"the embedding model {asked.model!r} does not exist; available: {known}", "model"
            )
        found = await self._embeddings.embed(_caller(task), known, asked.input, asked.dimensions)
        width = found.dimensions * 4
        rows = [found.vectors[at : at + width] for at in range(0, len(found.vectors), width)]
        as_text = asked.encoding_format == "base64"
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": base64.b64encode(row).decode()
                if as_text
                else memoryview(row).cast("f").tolist(),
            }
            for index, row in enumerate(rows)
        ]
        usage = {"prompt_tokens": found.tokens, "total_tokens": found.tokens}
        return {"object": "list", "data": data, "model": asked.model, "usage": usage}

    async def _response(self, task: BatchTask, body: Mapping[str, Any]) -> Mapping[str, Any]:
        asked = _parsed(ResponsesRequest, body)
        if asked.previous_response_id is not None:
            raise InvalidRequest("a line of a batch stands alone", "previous_response_id")
        response_id = new_id("resp").replace("-", "_")
        call = asked.to_call((), timeout_s=None, response_id=response_id)
        # Its place is the output file: a line is not stored a second time.
        head = {**head_of(asked, response_id, int(time.time())), "store": False, "service_tier": "flex"}
        reader = ResponseReader(head, results=bool(asked.include))
        stream = await self._generate(task, call)
        facts: list[Fact] = [Began()]
        if call.retrieval is not None:
            query = question_of(call.request.messages or ())
            degraded = stream.headers.get("x-shoal-degraded", "")
            facts.append(Searched(query=query, passages=tuple(stream.passages), degraded=degraded))
        try:
            deltas = [delta async for delta in stream]
        finally:
            await stream.aclose()
        ended = finished(deltas, int(time.time()))
        for fact in [*facts, *map(Said, deltas), *([ended] if ended else [])]:
            reader.add(fact)
        return reader.body()

    async def _generate(self, task: BatchTask, call: GenerationCall) -> ModelStream:
        request = replace(call.request, cache_salt=task.cache_salt)
        model = task.aliases.get(call.model, call.model)
        made = replace(call, model=model, request=request, whole=True)
        _check_scopes(task.principal, made)
        return await self._answering.generate(_caller(task), made, StageClock())


def _caller(task: BatchTask) -> AuthenticatedKey:
    return AuthenticatedKey(principal=task.principal, limits=task.limits, tenant_limits=task.tenant_limits)


def _check_scopes(principal: Principal, call: GenerationCall) -> None:
    scopes = principal.scopes
    if call.retrieval is not None and "documents" not in scopes and "admin" not in scopes:
        raise InvalidRequest("the key of this batch lacks the scope 'documents'", "retrieval")


async def _collect(stream: ModelStream, answer: ChatAnswer | CompletionAnswer) -> None:
    try:
        async for delta in stream:
            answer.add(delta)
    finally:
        await stream.aclose()


def _parsed(model: type[M], body: Mapping[str, Any]) -> M:
    """The same check as a request's body has."""
    try:
        return model.model_validate_json(msgspec.json.encode(body))
    except ValidationError as error:
        raise invalid_request(error.errors(include_url=False)) from None
