"""`Gateway`: what happens between a request and its answer, without any transport.

Owns the order of the steps: authenticate, find the model, reserve limits, retrieve, build the prompt, queue,
stream, settle. `app.main` joins HTTP to it in one process, `app.client` calls it over a handle. Where tokens
come from is `actors.handles`, how OpenAI's JSON looks is `app.schemas`.
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
from actors.engines.tokens import TokenCounter, counter_for, prompt_tokens
from actors.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    ModelNotFound,
    PermissionDenied,
)
from actors.gateway_config import GatewayConfig, GatewayRoutes
from actors.gateway_direct import DirectCalls
from actors.handles.embedder import EmbedderClient
from actors.handles.model import Admission, ModelStream
from actors.handles.models import ModelDirectory
from actors.policies.prediction import OutputPredictor
from actors.policies.prefix import prefix_of
from actors.rag import Context, RagStage, with_context
from actors.stores.catalog import Catalog
from actors.stores.documents import DocumentStore
from actors.stores.jobs import JobLog
from actors.stores.keys import AuthenticatedKey, KeyStore, open_key
from actors.stores.limits import LimitStore, Reservation
from actors.stores.pepper import load_pepper
from actors.stores.redis import connect
from actors.telemetry import StageClock
from actors.types import (
    Embeddings,
    GenerationCall,
    GenerationRequest,
    ModelCard,
    Principal,
    RetrievalQuery,
    RetrievalResult,
    Usage,
)

_CARD_WAIT_S = 2.0  # a model that never had a replica is served without knowing its tokenizer
_COUNT_IN_THREAD_CHARS = 50_000
_log = telemetry.logger("gateway")


class Gateway(DirectCalls):
    """The API layer's actor, free of transport.

    Args:
        config: see `GatewayConfig`.

    Attributes:
        catalog: records of files and vector stores, for the document routes.
        documents: their bodies.
        jobs: where ingestion is enqueued.
    """

    def __init__(self, config: GatewayConfig) -> None:
        telemetry.configure_logging()
        self.config = config
        gateway_id = serve.get_replica_context().replica_id.unique_id
        self._routes = GatewayRoutes()
        self._models = ModelDirectory(gateway_id)
        self._predictor = OutputPredictor()
        self._pepper = load_pepper(config.auth.pepper_file, config.storage)
        self._redis = connect(config.storage.effective_redis_url)
        self.catalog = Catalog(self._redis)
        self.documents = DocumentStore(config.storage.effective_documents_url)
        self.jobs = JobLog(self._redis)
        self._keys = KeyStore(self._redis, self._pepper, config.auth)
        self._limits = LimitStore(self._redis, expected_gateways=config.expected_gateways)
        self._counters: dict[str, TokenCounter] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._rag = RagStage(config.retrieval) if config.retrieval else None
        self._embedder = EmbedderClient(config.retrieval.app_name) if config.retrieval else None

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
        timeout_s = min(call.timeout_s or self.config.default_timeout_s, self.config.max_timeout_s)
        model = await self._models.find(self._routes.aliases.get(call.model, call.model))
        card = model.card or await model.wait_for_card(_CARD_WAIT_S)
        request = replace(call.request, cache_salt=self._cache_salt(principal.tenant))
        context = Context()
        if call.retrieval is not None:
            context = await self._rag_stage().context(principal, request, call.retrieval, clock)
        request, passages = with_context(request, context, card, self._counter(card))
        tokens = await _count(card, request)
        predicted = self._predictor.predict(principal.tenant, request.sampling.max_tokens)
        expected = self._predictor.expect(principal.tenant, request.sampling.max_tokens)
        reservation = await self._limits.reserve(caller, tokens + expected * request.sampling.n)

        def settle(usage: Usage | None) -> None:
            self._settle(principal, model.name, request, reservation, usage)

        admission = Admission(
            principal=principal,
            prompt_tokens=tokens,
            predicted_output_tokens=predicted,
            timeout_s=timeout_s - clock.elapsed_s(),
            whole=call.whole,
            prefix=prefix_of(request),
        )
        stream = await model.generate(request, admission, clock, settle)
        telemetry.observe(
            "shoal_ttft_seconds", stream.ttft_s, model=model.name, class_=principal.priority.value
        )
        stream.passages = passages
        stream.headers |= self._limits.headers(reservation)
        if context.degraded:
            stream.headers["x-shoal-degraded"] = context.degraded
        return stream

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
        reservation = await self._limits.reserve(caller, sum(_embedding_tokens(item) for item in inputs))
        clock.enter("embed")
        used = 0
        try:
            result = await self._embedder.embed(
                inputs, kind="passage", dimensions=dimensions, timeout_s=self.config.retrieval.embed_timeout_s
            )
            used = result.tokens
        finally:
            clock.enter("other")
            self._later(self._limits.settle(reservation, used))
        telemetry.count("shoal_tokens_total", used, model=known, direction="in")
        return result

    async def search(
        self, principal: Principal, query: RetrievalQuery, clock: StageClock | None = None
    ) -> RetrievalResult:
        """Search vector stores of the caller's tenant.

        Raises:
            NotFound: there is no such vector store.
            Unavailable, DeadlineExceeded: neither index answered.
        """
        return await self._rag_stage().search(replace(query, tenant=principal.tenant), clock)

    async def models(self) -> list[ModelCard]:
        """What can be asked for: deployed models, their aliases, the embedding model."""
        cards = [self._models.card(model) for model in await self._models.models()]
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
        applications = await self._models.applications()
        state = {app.name: "ready" if app.status == "RUNNING" else app.status for app in applications}
        return state if any(app.is_model for app in applications) else {**state, "models": "none deployed"}

    async def check_health(self) -> None:
        """The gateway is well while its event loop turns."""

    async def __del__(self) -> None:
        """Serve awaits this when the replica has drained."""
        if hasattr(self, "_keys"):
            await asyncio.gather(self._keys.aclose(), self._models.close(), *self._background)
            await self._redis.aclose()

    def _rag_stage(self) -> RagStage:
        if self._rag is None:
            raise InvalidRequest("this system has no retrieval stage", param="retrieval")
        return self._rag

    def _counter(self, card: ModelCard | None) -> TokenCounter:
        tokenizer = card.tokenizer if card is not None else ""
        if tokenizer not in self._counters:
            self._counters[tokenizer] = counter_for(tokenizer)
        return self._counters[tokenizer]

    def _settle(
        self,
        principal: Principal,
        model: str,
        request: GenerationRequest,
        reservation: Reservation,
        usage: Usage | None,
    ) -> None:
        used = usage.total_tokens if usage is not None else 0
        self._later(self._limits.settle(reservation, used))
        if usage is not None:
            self._predictor.observe(principal.tenant, usage.completion_tokens // max(request.sampling.n, 1))
            telemetry.count("shoal_tokens_total", usage.prompt_tokens, model=model, direction="in")
            telemetry.count("shoal_tokens_total", usage.completion_tokens, model=model, direction="out")

    def _later(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

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


async def _count(card: ModelCard | None, request: GenerationRequest) -> int:
    """Prompt tokens, as well as the gateway can know them; the engine has the last word.

    Raises:
        ContextLengthExceeded: the prompt cannot fit, whatever the template adds.
    """
    known = card or ModelCard(name="", context_tokens=0, tokenizer="")
    if _prompt_chars(request) > _COUNT_IN_THREAD_CHARS:
        tokens = await asyncio.to_thread(prompt_tokens, known, request)
    else:
        tokens = prompt_tokens(known, request)
    overhead = known.template_overhead_tokens * len(request.messages or ())
    if card is not None and tokens - overhead >= card.context_tokens:
        raise ContextLengthExceeded(
            f"the prompt has about {tokens} tokens and this model's context is {card.context_tokens}",
            param="messages" if request.messages is not None else "prompt",
        )
    return tokens


def _prompt_chars(request: GenerationRequest) -> int:
    return len(request.prompt or "") + sum(len(message.content) for message in request.messages or ())


def _embedding_tokens(item: str | Sequence[int]) -> int:
    return len(item) if not isinstance(item, str) else max(1, len(item.encode()) // 4)
