"""The application builders: what is deployed for which arguments."""

import pytest
from pydantic import ValidationError
from ray.serve._private.build_app import build_app

from app.config import GatewayArgs, LocalServicesArgs, ModelArgs, RetrievalArgs
from app.main import build_gateway, build_local_services, build_model, build_retrieval

SCRIPTED = {"model": "m", "engine": {"scripted": {}}}


def deployments(application):
    built = build_app(
        application, name="app", default_runtime_env=None, make_deployment_handle=lambda *_: None
    )
    return {deployment.name for deployment in built.deployments}, built.ingress_deployment_name


def local(**storage):
    return deployments(build_local_services(LocalServicesArgs.model_validate({"storage": storage})))[0]


def test_a_model_is_a_queue_with_its_pool_under_it():
    found, root = deployments(build_model(ModelArgs.model_validate(SCRIPTED)))
    assert found == {"BatchingQueue", "LLMReplica"}
    assert root == "BatchingQueue"  # HAProxy mode refuses a custom router on a root


def test_retrieval_is_search_embedding_and_ingestion():
    found, root = deployments(build_retrieval(RetrievalArgs()))
    assert found == {"Retriever", "Embedder", "JobRunner"}
    assert root == "Retriever"


def test_the_gateway_is_alone():
    assert deployments(build_gateway(GatewayArgs()))[0] == {"Gateway"}


def test_nothing_local_starts_for_what_has_an_outside_address():
    assert local() == {"ValkeyServer", "ChromaServer"}
    assert local(redis_url="redis://r:6379") == {"ChromaServer"}
    assert local(redis_url="redis://r:6379", chroma_url="http://c:8000") == {"NoLocalServices"}


def test_only_the_gateway_answers_http():
    """An application's root with `__call__` answers unauthenticated in HAProxy mode."""
    for application in (
        build_model(ModelArgs.model_validate(SCRIPTED)),
        build_retrieval(RetrievalArgs()),
        build_local_services(LocalServicesArgs()),
    ):
        root = application._bound_deployment.func_or_class
        assert not hasattr(root, "__call__") or "__call__" not in vars(root)  # noqa: B004  its own, not type's


@pytest.mark.parametrize(
    ("args", "path"),
    [
        ({**SCRIPTED, "modle": 1}, "args.modle"),
        ({"model": "m", "engine": {"scripted": {"itl_bas_s": 1}}}, "args.engine.scripted.itl_bas_s"),
        ({**SCRIPTED, "queue": {"lookahead": 1}}, "args.queue.lookahead"),
    ],
)
def test_an_unknown_key_is_refused_with_its_path_and_what_is_allowed_there(args, path):
    with pytest.raises(ValidationError, match="allowed: ") as refused:
        ModelArgs.model_validate(args)
    assert f"unknown key {path}; allowed: " in str(refused.value)


def test_exactly_one_engine_must_be_named():
    with pytest.raises(ValidationError, match="exactly one engine"):
        ModelArgs.model_validate({"model": "m", "engine": {}})


def test_storage_is_given_once():
    with pytest.raises(ValidationError, match=r"args\.storage"):
        RetrievalArgs.model_validate({"retriever": {"storage": {"data_dir": "/x"}}})
