"""`Gateway`: what happens between a request and its answer, without any transport.

Owns who may ask for what, under which name, and in which class; the steps of an answer are `actors.answering`.
`app.main` joins HTTP to it in one process, `app.client` calls it over a handle. How OpenAI's JSON looks is
`app.schemas`.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ray import serve

from actors import telemetry
from actors.answering import Answering, Deadlines, EmbeddingCalls
from actors.errors import ModelNotFound, PermissionDenied
from actors.gateway_config import GatewayConfig, GatewayRoutes
from actors.gateway_direct import DirectCalls
from actors.handles.embedder import EmbedderClient
from actors.handles.model import ModelStream
from actors.policies.batches import BatchTask, Endpoint
from actors.policies.responses import ResponseTask
from actors.rag import RagStage
from actors.stores.batches import Batches
from actors.stores.catalog import Catalog
from actors.stores.documents import DocumentStore
from actors.stores.durable import FSYNC_TIMEOUT_S, DurableWrites
from actors.stores.jobs import JobLog
from actors.stores.keys import AuthenticatedKey, KeyStore, open_key
from actors.stores.limits import LimitStore
from actors.stores.pepper import load_pepper
from actors.stores.redis import connect
from actors.stores.responses import Responses
from actors.telemetry import StageClock
from actors.types import (
    Embeddings,
    GenerationCall,
    ModelCard,
    Principal,
    PriorityClass,
    RetrievalQuery,
    RetrievalResult,
)

_log = telemetry.logger("gateway")


class Gateway(DirectCalls):
    """The API layer's actor, free of transport.

    Args:
        config: see `GatewayConfig`.

    Attributes:
        catalog: records of files and vector stores, for the document routes.
        documents: their bodies.
        jobs: where ingestion is enqueued.
        responses: those that are stored, and those that run in the background.
        batches: files of requests.
    """

    def __init__(self, config: GatewayConfig) -> None:
        telemetry.configure_logging()
        self.config = config
        gateway_id = serve.get_replica_context().replica_id.unique_id
        self._routes = GatewayRoutes()
        self._pepper = load_pepper(config.auth.pepper_file, config.storage)
        self._redis = connect(config.storage.effective_redis_url)
        self.catalog = Catalog(self._redis)
        self.documents = DocumentStore(config.storage.effective_documents_url)
        durability = config.storage.durability
        self._writes = self._redis
        if durability == "fsynced":
            self._writes = connect(config.storage.effective_redis_url, timeout_s=FSYNC_TIMEOUT_S)
        self.jobs = JobLog(self._redis, durable=DurableWrites(self._writes, durability))
        self.responses = Responses(self._redis, self.jobs, config.responses)
        self.batches = Batches(self._redis, self.jobs, config.responses.keep_s)
        self._keys = KeyStore(self._redis, self._pepper, config.auth)
        self._limits = LimitStore(self._redis, expected_gateways=config.expected_gateways)
        self._answering = Answering(
            gateway_id,
            self._limits,
            RagStage(config.retrieval) if config.retrieval else None,
            Deadlines(default_s=config.default_timeout_s, longest_s=config.max_timeout_s),
        )
        self._embedder = self._embedding_calls()

    def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Take new routes; bad ones are reported and the old ones stay: raising would end the application."""
        try:
            self._routes = GatewayRoutes.model_validate(user_config)
        except ValueError as error:
            _log.error("routes_refused", reason=str(error))

    async def authenticate(self, authorization: str | None, clock: StageClock) -> AuthenticatedKey:
        """Who is calling.

        Raises:
            AuthenticationFailed: no good key.
            Unavailable: the key is unknown here and Redis is down.
        """
        clock.enter("auth")
        try:
            if self.config.auth.mode == "open":
                return open_key(self.config.auth)
            return await self._keys.authenticate(authorization)
        finally:
            clock.enter("other")

    async def generate(
        self, caller: AuthenticatedKey, call: GenerationCall, clock: StageClock
    ) -> ModelStream:
        """Run one chat or completion; returns when its first delta is at hand, or all of one wanted whole.

        Raises:
            ShoalError: anything that goes wrong before the first token.
        """
        principal = _principal(caller, call)
        return await self._answering.generate(
            replace(caller, principal=principal), self._prepared(call, principal.tenant), clock
        )

    async def accept(self, caller: AuthenticatedKey, call: GenerationCall) -> ResponseTask:
        """Check a background response and count it; what is returned can run anywhere and at any time.

        It runs in class `batch`, or in the key's own when the call asks for a class.

        Raises:
            ModelNotFound, ContextLengthExceeded, NotFound: it could never be answered.
            RateLimited: the caller's requests are used up.
        """
        tier = call.service_tier or PriorityClass.BATCH
        principal = _principal(caller, replace(call, service_tier=tier))
        call = self._prepared(call, principal.tenant)
        call = replace(call, model=await self._answering.check(call))
        if call.retrieval is not None:
            self._answering.rag_stage()
            for store_id in call.retrieval.vector_store_ids:
                await self.catalog.generation(principal.tenant, store_id)
        await self._limits.reserve(caller, 0)
        return ResponseTask(
            response_id=call.request.request_id,
            principal=principal,
            call=call,
            limits=caller.limits,
            tenant_limits=caller.tenant_limits,
        )

    async def accept_batch(
        self, caller: AuthenticatedKey, batch_id: str, endpoint: Endpoint, input_file_id: str
    ) -> BatchTask:
        """Count a batch; what is returned can run anywhere and at any time. Its lines count as they run.

        Raises:
            RateLimited: the caller's requests are used up.
        """
        _require(caller.principal, "inference")
        await self._limits.reserve(caller, 0)
        settings = self.config.retrieval
        return BatchTask(
            batch_id=batch_id,
            principal=replace(caller.principal, priority=PriorityClass.BATCH),
            endpoint=endpoint,
            input_file_id=input_file_id,
            cache_salt=self._cache_salt(caller.principal.tenant),
            embedding_model=settings.embedding_model if settings else "",
            aliases=self._routes.aliases,
            limits=caller.limits,
            tenant_limits=caller.tenant_limits,
        )

    async def embed(
        self,
        caller: AuthenticatedKey,
        model: str,
        inputs: Sequence[str] | Sequence[Sequence[int]],
        clock: StageClock,
        dimensions: int | None = None,
    ) -> Embeddings:
        """Embed texts or token ids.

        Raises:
            ModelNotFound: it is not this system's embedding model.
            InvalidRequest: from the model, about an input or the dimensions.
            Unavailable: the embedder is down.
        """
        _require(caller.principal, "inference")
        if self._embedder is None or self.config.retrieval is None:
            raise ModelNotFound("this system serves no embedding model", param="model")
        known = self.config.retrieval.embedding_model
        if self._routes.aliases.get(model, model) != known:
            raise ModelNotFound(f"the embedding model {model!r} does not exist; available: {known}", "model")
        clock.enter("embed")
        try:
            return await self._embedder.embed(caller, known, inputs, dimensions)
        finally:
            clock.enter("other")

    async def search(
        self, principal: Principal, query: RetrievalQuery, clock: StageClock | None = None
    ) -> RetrievalResult:
        """Search vector stores of the caller's tenant.

        Raises:
            NotFound: there is no such vector store.
            Unavailable, DeadlineExceeded: neither index answered.
        """
        return await self._answering.rag_stage().search(replace(query, tenant=principal.tenant), clock)

    async def models(self) -> list[ModelCard]:
        """What can be asked for: deployed models, their aliases, the embedding model."""
        cards = [self._answering.models.card(model) for model in await self._answering.models.models()]
        by_name = {card.name: card for card in cards}
        for alias, name in self._routes.aliases.items():
            if name in by_name:
                cards.append(replace(by_name[name], name=alias))
        if self.config.retrieval is not None:
            cards.append(
                ModelCard(
                    name=self.config.retrieval.embedding_model,
                    context_tokens=0,
                    tokenizer="",
                    type="embedding",
                )
            )
        return cards

    async def ready(self) -> dict[str, str]:
        """Application → "ready", or its status in Serve's words; says nothing about tenants."""
        applications = await self._answering.models.applications()
        state = {app.name: "ready" if app.status == "RUNNING" else app.status for app in applications}
        return state if any(app.is_model for app in applications) else {**state, "models": "none deployed"}

    async def check_health(self) -> None:
        """The gateway is well while its event loop turns."""

    async def __del__(self) -> None:
        """Serve awaits this when the replica has drained."""
        if hasattr(self, "_keys"):
            await asyncio.gather(self._keys.aclose(), self._answering.aclose(), self.responses.aclose())
            await asyncio.gather(self._redis.aclose(), self._writes.aclose())

    def _embedding_calls(self) -> EmbeddingCalls | None:
        settings = self.config.retrieval
        if settings is None:
            return None
        return EmbeddingCalls(EmbedderClient(settings.app_name), self._limits, settings.embed_timeout_s)

    def _prepared(self, call: GenerationCall, tenant: str) -> GenerationCall:
        """The call under the model's real name, with the salt that keeps tenants' prefixes apart."""
        request = replace(call.request, cache_salt=self._cache_salt(tenant))
        return replace(call, model=self._routes.aliases.get(call.model, call.model), request=request)

    def _cache_salt(self, tenant: str) -> str:
        return hmac.new(self._pepper, tenant.encode(), hashlib.sha256).hexdigest()[:32]


def _principal(caller: AuthenticatedKey, call: GenerationCall) -> Principal:
    """The caller with the class that `service_tier` asks for: it may lower the key's class, not raise it."""
    principal = caller.principal
    _require(principal, "inference")
    if call.retrieval is not None:
        _require(principal, "documents")
    tier = call.service_tier
    if tier is not None and tier.rank > principal.priority.rank:
        return replace(principal, priority=tier)
    return principal


def _require(principal: Principal, scope: str) -> None:
    if scope not in principal.scopes and "admin" not in principal.scopes:
        raise PermissionDenied(f"this key lacks the scope {scope!r}; it has: {', '.join(principal.scopes)}")
