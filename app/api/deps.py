"""How a route gets at the gateway, its caller and its body.

`GatewayService` is what routes see of `actors.gateway.Gateway`. In a replica it is the servable object; tests
put another one into `app.dependency_overrides[gateway_service]`. Who may do what is decided here, by
dependencies that read the Authorization header and nothing else: never the path, the query or a cookie.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, TypeVar, cast

from fastapi import Depends, FastAPI, Request
from pydantic import BaseModel, ValidationError
from ray import serve

from actors.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    Overloaded,
    PermissionDenied,
    ReplicaGone,
    Unavailable,
)
from actors.handles.token_stream import Write
from actors.telemetry import StageClock
from actors.types import (
    Embeddings,
    GenerationCall,
    ModelCard,
    Passage,
    Principal,
    RetrievalQuery,
    RetrievalResult,
    TokenDelta,
)
from app.api.context import RequestContext
from app.schemas.bad_input import invalid_request
from app.schemas.common import Inputs

CONTEXT_KEY = "request_context"
TIMEOUT_HEADER = "x-request-timeout-ms"
MAX_TIMEOUT_MS = 3_600_000

M = TypeVar("M", bound=BaseModel)


class EdgeConfig(Protocol):
    """What HTTP reads of the gateway's configuration."""

    @property
    def max_body_bytes(self) -> int:
        """Largest body of every request but an upload."""

    @property
    def max_upload_bytes(self) -> int:
        """Largest body of `POST /v1/files`."""

    @property
    def expose_docs(self) -> bool:
        """Whether /docs and /openapi.json answer."""

    @property
    def announce_url(self) -> str | None:
        """Where to say that the system answers, once it is ready; None: say nothing."""


class Caller(Protocol):
    """Who asks; the gateway keeps the limits of the key here too."""

    @property
    def principal(self) -> Principal:
        """Tenant, class and scopes."""


class GenerationStream(Protocol):
    """The deltas of one answer, the first of them at hand."""

    @property
    def request_id(self) -> str:
        """Of the engine's request."""

    @property
    def passages(self) -> Sequence[Passage]:
        """What the model was given as context, in the order of its numbers; empty without retrieval."""

    @property
    def headers(self) -> Mapping[str, str]:
        """x-ratelimit-*, x-shoal-degraded, x-shoal-cache."""

    @property
    def expires_at(self) -> float:
        """Its deadline, in the event loop's time."""

    def __aiter__(self) -> AsyncIterator[TokenDelta]:
        """Iterate; raises `ShoalError` when the work fails."""

    async def follow(self, write: Write) -> None:
        """Hand every delta to `write` as it comes, to the last one; raises as the iterator does."""

    async def aclose(self) -> None:
        """Cancel the work down to the engine; twice is once."""


class GatewayService(Protocol):
    """The gateway as HTTP sees it. `caller` is what `authenticate` returned, handed back unopened."""

    @property
    def config(self) -> EdgeConfig:
        """Its configuration."""

    async def authenticate(self, authorization: str | None, clock: StageClock) -> Caller:
        """Who holds this key; spends the stage `auth` on the clock.

        Raises:
            AuthenticationFailed: no key, or one that is not valid.
        """

    async def generate(self, caller: Any, call: GenerationCall, clock: StageClock) -> GenerationStream:
        """Start an answer; returns with the first delta at hand, so failures up to there are raised here."""

    async def accept(self, caller: Any, call: GenerationCall) -> Any:
        """Check a call that is to run in the background; returns the task that the job log takes."""

    async def accept_batch(self, caller: Any, batch_id: str, endpoint: Any, input_file_id: str) -> Any:
        """Check and count a batch; returns the task that the job log takes."""

    async def embed(
        self, caller: Any, model: str, texts: Inputs, clock: StageClock, dimensions: int | None = None
    ) -> Embeddings:
        """Vectors of texts, or of token ids."""

    async def models(self) -> Sequence[ModelCard]:
        """What can be named as `model`."""

    async def ready(self) -> Mapping[str, str]:
        """Component → "ready", or why it is not."""


class Services(Protocol):
    """The gateway as the document routes see it: the stores behind it, and search."""

    catalog: Any
    documents: Any
    jobs: Any
    responses: Any
    batches: Any

    async def search(
        self, principal: Principal, query: RetrievalQuery, clock: StageClock | None = None
    ) -> RetrievalResult:
        """Search the caller's vector stores."""


def gateway_service() -> GatewayService:
    """The gateway of this replica.

    Raises:
        Unavailable: the replica is still starting.
    """
    servable = serve.get_replica_context().servable_object
    if servable is None:
        raise Unavailable("the gateway is starting", retry_after_s=1)
    return cast(GatewayService, servable)


def gateway_of(app: FastAPI) -> GatewayService:
    """The gateway, or what a test put in its place; for code that FastAPI injects nothing into."""
    return cast(GatewayService, app.dependency_overrides.get(gateway_service, gateway_service)())


async def services(request: Request) -> Services:
    """Dependency of the document routes."""
    return cast(Services, gateway_of(request.app))


def context_of(request: Request) -> RequestContext:
    """The context that the middleware made for this request."""
    return cast(RequestContext, getattr(request.state, CONTEXT_KEY))


# --- who asks ----------------------------------------------------------------------------------------

# Errors that a gateway raises only for a model that exists: safe to be labels of metrics.
_OF_A_KNOWN_MODEL = (ContextLengthExceeded, Overloaded, EngineFailed, ReplicaGone, DeadlineExceeded)


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """An authenticated request."""

    gateway: GatewayService
    caller: Caller
    context: RequestContext

    async def generate(self, call: GenerationCall, clock: StageClock | None = None) -> GenerationStream:
        """Start one answer.

        Args:
            call: what to answer.
            clock: another clock than the request's, for all but the first of several parallel calls.
        """
        try:
            stream = await self.gateway.generate(self.caller, call, clock or self.context.clock)
        except _OF_A_KNOWN_MODEL:
            self.context.model = call.model
            raise
        self.context.model = call.model
        return stream

    async def accept(self, call: GenerationCall) -> Any:
        """Check a call that is to run in the background."""
        return await self.gateway.accept(self.caller, call)

    async def accept_batch(self, batch_id: str, endpoint: Any, input_file_id: str) -> Any:
        """Check and count a batch; returns the task that the job log takes."""
        return await self.gateway.accept_batch(self.caller, batch_id, endpoint, input_file_id)


async def _session(request: Request, scope: str | None) -> Session:
    gateway, context = gateway_of(request.app), context_of(request)
    caller = await gateway.authenticate(request.headers.get("authorization"), context.clock)
    allowed = caller.principal.scopes
    if scope is not None and scope not in allowed and "admin" not in allowed:
        raise PermissionDenied(f"this key lacks the scope '{scope}'; it has: {', '.join(allowed) or 'none'}")
    return Session(gateway=gateway, caller=caller, context=context)


async def any_caller(request: Request) -> Session:
    """Dependency: a valid key, whatever its scopes."""
    return await _session(request, None)


async def inference_caller(request: Request) -> Session:
    """Dependency: a valid key with the scope `inference`."""
    return await _session(request, "inference")


async def documents_caller(request: Request) -> Session:
    """Dependency: a valid key with the scope `documents`."""
    return await _session(request, "documents")


AnySession = Annotated[Session, Depends(any_caller)]
InferenceSession = Annotated[Session, Depends(inference_caller)]
DocumentsSession = Annotated[Session, Depends(documents_caller)]


# --- what is asked -----------------------------------------------------------------------------------


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """What `openapi_extra` of a route says of the body that `read_json` takes."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


async def read_json(request: Request, model: type[M]) -> M:
    """Parse and check the body in one pass; call it after authentication, so strangers' bodies stay unread.

    Raises:
        InvalidRequest: it is not JSON, or not what `model` says.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise InvalidRequest(
            f"Content-Type must be application/json, not '{content_type[:64] or 'absent'}'", "Content-Type"
        )
    body = await request.body()
    if not body:
        raise InvalidRequest("a JSON request body is required")
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise invalid_request(error.errors(include_url=False)) from None


def timeout_s(request: Request) -> float | None:
    """The deadline that the caller asks for with `x-request-timeout-ms`, in seconds.

    Raises:
        InvalidRequest: not a whole number in range.
    """
    text = request.headers.get(TIMEOUT_HEADER)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:12]) <= MAX_TIMEOUT_MS):
        raise InvalidRequest(
            f"{TIMEOUT_HEADER} must be a whole number of milliseconds from 1 to {MAX_TIMEOUT_MS}",
            TIMEOUT_HEADER,
        )
    return int(text) / 1e3
