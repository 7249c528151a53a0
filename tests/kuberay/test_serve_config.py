"""`serveConfigV2` comes from configs/, and its replicas fit into the pods beside it."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from pathlib import Path
from typing import Any

import pytest
from kubernetes.utils.quantity import parse_quantity

ROOT = Path(__file__).parents[2]
Object = dict[str, Any]


def generator() -> Any:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "kuberay" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_written_patches_are_what_the_configs_say_now():
    generate = generator()
    for config, path in generate.PATCHES.items():
        assert (ROOT / path).read_text() == generate.patch(config), "run: python kuberay/generate.py"


@pytest.mark.parametrize(
    ("kustomization", "config"),
    [
        ("base", "cpu"),
        ("overlays/cpu-dev", "cpu"),
        ("overlays/gpu", "gpu"),
        ("overlays/production", "production"),
    ],
    indirect=["kustomization"],
)
def test_the_rendered_text_is_the_config_file(rayservice, config):
    assert rayservice["spec"]["serveConfigV2"] == (ROOT / "configs" / f"{config}.yaml").read_text()


def test_stores_and_secrets_come_from_the_environment_of_the_workers(serve_config, groups):
    env = {e["name"] for e in groups["cpu"]["template"]["spec"]["containers"][0]["env"]}
    for application in serve_config["applications"]:
        storage = application["args"].get("storage", {})
        for field, url in storage.items():
            assert not field.endswith("_url") or url.removeprefix("env:") in env, (application["name"], field)


def test_no_caller_is_anonymous(serve_config):
    (gateway,) = [a for a in serve_config["applications"] if a["name"] == "gateway"]
    assert gateway["args"]["auth"]["mode"] == "keys"


# --- resources -----------------------------------------------------------------------------------------


def replicas(serve_config: Object, bound: str) -> list[Object]:
    """The `ray_actor_options` of every replica at one end of its pool's bounds."""
    found = []
    for application in serve_config["applications"]:
        for deployment in application["deployments"]:
            pool = deployment.get("autoscaling_config")
            count = pool[bound] if pool else deployment["num_replicas"]
            found += [deployment["ray_actor_options"]] * count
    return found


def capacity(group: Object) -> dict[str, float]:
    """What Ray counts on one pod of a group: rayStartParams first, limits otherwise, as the operator does."""
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    cpus = group["rayStartParams"].get("num-cpus") or int(parse_quantity(limits["cpu"]))
    # KubeRay counts a MIG slice as a GPU, too.
    gpus = group["rayStartParams"].get("num-gpus") or sum(int(n) for k, n in limits.items() if "nvidia" in k)
    return {"num_cpus": float(cpus), "num_gpus": float(gpus)}


def test_every_deployment_says_what_it_takes(serve_config):
    for application in serve_config["applications"]:
        for deployment in application["deployments"]:
            assert deployment["ray_actor_options"]["num_cpus"] > 0, deployment["name"]
            assert ("autoscaling_config" in deployment) != ("num_replicas" in deployment), deployment["name"]


def test_every_replica_fits_on_one_pod(serve_config, groups):
    for replica in replicas(serve_config, "max_replicas"):
        selector = replica.get("label_selector", {})
        fitting = [
            name
            for name, group in groups.items()
            if selector.items() <= group.get("labels", {}).items()
            and all(replica.get(resource, 0) <= amount for resource, amount in capacity(group).items())
        ]
        assert fitting, replica


@pytest.mark.parametrize(
    ("bound", "count"), [("min_replicas", "minReplicas"), ("max_replicas", "maxReplicas")]
)
def test_the_groups_hold_all_replicas_together(serve_config, groups, bound, count):
    for resource in ("num_cpus", "num_gpus"):
        wanted = sum(replica.get(resource, 0) for replica in replicas(serve_config, bound))
        there = sum(capacity(group)[resource] * group.get(count, 0) for group in groups.values())
        assert wanted <= there, resource


@pytest.mark.parametrize(
    ("bound", "count"), [("min_replicas", "minReplicas"), ("max_replicas", "maxReplicas")]
)
def test_a_pool_holds_all_replicas_that_ask_for_it(serve_config, groups, bound, count):
    for name, group in groups.items():
        labels = group.get("labels", {})
        here = [
            r for r in replicas(serve_config, bound)
            if r.get("label_selector") and r["label_selector"].items() <= labels.items()
        ]  # fmt: skip
        for resource, amount in capacity(group).items():
            assert sum(r.get(resource, 0) for r in here) <= amount * group.get(count, 0), (name, resource)


def test_every_application_is_one_that_can_be_imported_and_takes_its_arguments(serve_config):
    for application in serve_config["applications"]:
        module, builder = application["import_path"].split(":")
        function = getattr(importlib.import_module(module), builder)
        (parameter,) = inspect.signature(function).parameters.values()
        parameter.annotation.model_validate(application["args"])


def test_gateways_find_a_node_each_among_the_fewest(serve_config, groups):
    (gateway,) = [d for a in serve_config["applications"] for d in a["deployments"] if d["name"] == "Gateway"]
    assert gateway["max_replicas_per_node"] == 1
    assert gateway["num_replicas"] <= groups["cpu"]["minReplicas"]
