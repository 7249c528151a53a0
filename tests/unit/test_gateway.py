"""The gateway's own decisions, without a cluster."""

import pytest
import structlog

from actors.answering import count
from actors.errors import ContextLengthExceeded, PermissionDenied
from actors.gateway import Gateway, _principal
from actors.gateway_config import GatewayRoutes
from actors.stores.keys import AuthenticatedKey
from actors.types import (
    GenerationCall,
    GenerationRequest,
    Message,
    ModelCard,
    Principal,
    PriorityClass,
    RetrievalOptions,
)

CARD = ModelCard(name="m", context_tokens=50, tokenizer="scripted")


def request(text="hello"):
    return GenerationRequest(request_id="r", messages=(Message(role="user", content=text),))


def call(**fields):
    return GenerationCall(model="m", request=request(), **fields)


def key(**fields):
    return AuthenticatedKey(principal=Principal(tenant="t", **fields))


@pytest.mark.parametrize(
    ("of_the_key", "asked", "given"),
    [
        (PriorityClass.STANDARD, None, PriorityClass.STANDARD),
        (PriorityClass.STANDARD, PriorityClass.BATCH, PriorityClass.BATCH),
        (PriorityClass.STANDARD, PriorityClass.INTERACTIVE, PriorityClass.STANDARD),
    ],
)
def test_service_tier_may_lower_the_class_of_the_key_and_never_raise_it(of_the_key, asked, given):
    assert _principal(key(priority=of_the_key), call(service_tier=asked)).priority is given


def test_a_key_needs_the_scopes_of_what_it_asks_for():
    with pytest.raises(PermissionDenied, match="inference"):
        _principal(key(scopes=("documents",)), call())
    retrieval = RetrievalOptions(vector_store_ids=("vs",))
    with pytest.raises(PermissionDenied, match="documents"):
        _principal(key(scopes=("inference",)), call(retrieval=retrieval))
    assert _principal(key(scopes=("admin",)), call()).tenant == "t"


async def test_a_prompt_that_cannot_fit_is_refused_before_the_queue():
    with pytest.raises(ContextLengthExceeded, match="50"):
        await count(CARD, request("word " * 60))
    assert 0 < await count(CARD, request("word")) < 50
    assert await count(None, request("word " * 60)) > 50  # an unknown model: the engine has the last word


class RoutesOnly(Gateway):
    """A gateway without its connections."""

    def __init__(self):
        self._routes = GatewayRoutes()

    def __del__(self):
        pass


def test_bad_routes_are_refused_and_the_old_ones_stay():
    gateway = RoutesOnly()
    gateway.reconfigure({"aliases": {"gpt": "m"}})
    with structlog.testing.capture_logs() as lines:
        gateway.reconfigure({"alias": {"gpt": "other"}})
    assert gateway._routes == GatewayRoutes(aliases={"gpt": "m"})
    assert [line["event"] for line in lines] == ["routes_refused"]
