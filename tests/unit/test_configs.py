"""Every file in configs/: keys that Serve would ignore silently, builders and their arguments, resources.

Serve's own schema accepts unknown keys, so a misspelt one is a default that nobody asked for.
"""

from __future__ import annotations

import inspect
import typing
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from ray._common.utils import import_attr
from ray.serve._private.build_app import build_app
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.schema import LoggingConfig, RayActorOptionsSchema, ServeDeploySchema

from actors.policies.autoscaling import ScalingConfig
from app.scaling import QueuePolicy

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
Config = dict[str, Any]

# Fields that the schema leaves open (dict, Any) and that have a class of their own all the same.
BEHIND = {
    "autoscaling_config": AutoscalingConfig,
    "autoscaling_policy": AutoscalingPolicy,
    "request_router_config": RequestRouterConfig,
    "ray_actor_options": RayActorOptionsSchema,
    "logging_config": LoggingConfig,
}
# Free by nature, and checked by whom they are for (`args` below).
FREE = {"args", "user_config", "policy_kwargs", "request_router_kwargs", "runtime_env", "env_vars"}
CORES = 2  # of the smallest machine that local.yaml and scripted.yaml must run on


@pytest.fixture(params=CONFIGS, ids=lambda path: path.name)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def config(path: Path) -> Config:
    return yaml.safe_load(path.read_text())


def unknown_keys(model: type[BaseModel], value: Config, where: str = "") -> Iterator[str]:
    """Every key of `value` and below that has no field, with its path."""
    for key, child in value.items():
        field = model.model_fields.get(key)
        if field is None:
            yield f"{where}{key}"
        elif key not in FREE:
            classes = [BEHIND[key]] if key in BEHIND else models_in(field.annotation)
            for item in child if isinstance(child, list) else [child]:
                if isinstance(item, dict):
                    known = [list(unknown_keys(each, item, f"{where}{key}.")) for each in classes]
                    yield from min(known, key=len, default=[])


def models_in(annotation: Any) -> list[type[BaseModel]]:
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in models_in(part)]


def builder_of(application: Config) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of third parties, at import
        return import_attr(application["import_path"])


def args_class(application: Config) -> type[BaseModel]:
    (parameter,) = inspect.signature(builder_of(application)).parameters.values()
    return parameter.annotation


def built(application: Config) -> dict[str, Any]:
    """The application's deployments by name, as its builder makes them from the file's arguments."""
    args = args_class(application).model_validate(application.get("args", {}))
    app = build_app(builder_of(application)(args), name=application["name"])
    return {deployment.name: deployment for deployment in app.deployments}


# --- keys ----------------------------------------------------------------------------------------------


def test_every_key_is_one_that_serve_knows(config):
    assert list(unknown_keys(ServeDeploySchema, config)) == []


@pytest.mark.parametrize(
    ("misspelt", "named"),
    [
        ({"proxy_localtion": "HeadOnly"}, "proxy_localtion"),
        ({"http_options": {"hosts": "::"}}, "http_options.hosts"),
        ({"applications": [{"deployments": [{"num_replica": 2}]}]}, "applications.deployments.num_replica"),
        (
            {"applications": [{"deployments": [{"autoscaling_config": {"min_replica": 1}}]}]},
            "applications.deployments.autoscaling_config.min_replica",
        ),
        (
            {"applications": [{"deployments": [{"ray_actor_options": {"num_cpu": 1}}]}]},
            "applications.deployments.ray_actor_options.num_cpu",
        ),
        (
            {"applications": [{"autoscaling_policy": {"function": "f"}}]},
            "applications.autoscaling_policy.function",
        ),
    ],
)
def test_a_misspelt_key_is_found_at_any_depth(misspelt, named):
    assert list(unknown_keys(ServeDeploySchema, misspelt)) == [named]


def test_serve_takes_the_file(config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # metrics_interval_s has no better place yet
        ServeDeploySchema.model_validate(config)


# --- applications --------------------------------------------------------------------------------------


def test_the_arguments_are_taken_by_the_builders_own_class(config):
    for application in config["applications"]:
        args_class(application).model_validate(application.get("args", {}))


def test_the_deployments_named_are_those_the_builder_makes(config):
    for application in config["applications"]:
        named = {deployment["name"] for deployment in application.get("deployments", [])}
        assert named <= set(built(application)), application["name"]


def test_a_model_is_served_by_an_application_of_its_name(config):
    for application in config["applications"]:
        if application["import_path"] == "app.main:build_model":
            assert application["args"]["model"] == application["name"]
            assert application["route_prefix"] is None


def test_only_the_gateway_has_a_route(config):
    routes = {a["name"]: a.get("route_prefix", "/") for a in config["applications"]}
    assert {name for name, route in routes.items() if route is not None} <= {"gateway"}


def test_the_scaling_policy_has_settings_it_knows_and_pools_it_sees(config):
    for application in config["applications"]:
        policy = application.get("autoscaling_policy")
        if policy is None:
            continue
        assert import_attr(policy["policy_function"]) is QueuePolicy
        scaled = {d["name"]: d.get("autoscaling_config") for d in application["deployments"]}
        for name, settings in policy.get("policy_kwargs", {}).items():
            ScalingConfig(**settings)
            assert scaled[name], name
        if "LLMReplica" in scaled:
            # Without its block the queue is invisible to the policy, and the pool would never move.
            queue = scaled["BatchingQueue"]
            assert (queue["min_replicas"], queue["max_replicas"]) == (1, 1)
        for name, pool in scaled.items():
            if pool and pool["max_replicas"] > 1:
                delays = (pool.get("upscale_delay_s"), pool.get("downscale_delay_s"))
                assert delays == (0, 0), f"{name}: holding back is the policy's part"


# --- resources -----------------------------------------------------------------------------------------


def test_what_starts_on_one_machine_fits_on_two_cores(path, config):
    if path.name not in {"local.yaml", "scripted.yaml"}:
        pytest.skip("for a cluster: tests/kuberay holds it against its worker groups")
    wanted = 0.0
    for application in config["applications"]:
        overrides = {d["name"]: d for d in application.get("deployments", [])}
        for name, deployment in built(application).items():
            override = overrides.get(name, {})
            options = {**deployment.ray_actor_options, **override.get("ray_actor_options", {})}
            pool = override.get("autoscaling_config") or {}
            replicas = (
                pool.get("max_replicas") or override.get("num_replicas") or deployment.num_replicas or 1
            )
            wanted += options["num_cpus"] * replicas
    assert 0 < wanted <= CORES
