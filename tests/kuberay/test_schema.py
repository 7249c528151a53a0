"""Would an API server take the rendered objects? Each check is shown to refuse what it is there for."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

Object = dict[str, Any]
KUBERNETES = "1.34"
# Kinds of other operators: their CRDs are not at hand, `test_foreign_kinds.py` has the fields that we use.
FOREIGN = {"PodMonitor", "PrometheusRule", "Gateway", "HTTPRoute"}
CRDS = Path(__file__).parents[3] / "shared" / "data" / "kuberay-crds"

# --- the CRD -------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def rayservice_crd() -> Object:
    """The schema of RayService in version v1, as the CRD has it."""
    path = CRDS / "ray.io_rayservices.yaml"
    if not path.exists():
        pytest.skip("the KubeRay CRDs are not beside this checkout (../shared/data/kuberay-crds)")
    crd = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)
    (version,) = [v for v in crd["spec"]["versions"] if v["name"] == "v1"]
    return version["schema"]["openAPIV3Schema"]


@pytest.fixture(scope="session")
def rayservice_schema(rayservice_crd: Object) -> Object:
    """The RayService CRD, as an API server holds it against an object under strict validation."""
    free = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    return strict({**rayservice_crd, "properties": {**rayservice_crd["properties"], "metadata": free}})


def strict(schema: Object) -> Object:
    """A structural schema as JSON Schema in which unknown fields are errors."""
    out = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    out.pop("nullable", None)
    if "properties" in schema:
        out["properties"] = {name: strict(child) for name, child in schema["properties"].items()}
    if isinstance(schema.get("items"), dict):
        out["items"] = strict(schema["items"])
    if isinstance(schema.get("additionalProperties"), dict):
        out["additionalProperties"] = strict(schema["additionalProperties"])
    free = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if schema.get("type") == "object" and not free:
        out["additionalProperties"] = False
        if schema.get("x-kubernetes-embedded-resource"):
            for name in ("apiVersion", "kind", "metadata"):
                out["properties"].setdefault(name, {})
    if schema.get("x-kubernetes-int-or-string"):
        out["type"] = ["integer", "string"]
    if schema.get("nullable"):
        out = {"anyOf": [out, {"type": "null"}]}
    if "x-kubernetes-list-map-keys" in schema:
        out["x-keys"] = schema["x-kubernetes-list-map-keys"]
    return out


def with_defaults(schema: Object, value: Any) -> Any:
    """`value` with the schema's defaults filled in, as an API server does before it validates."""
    if isinstance(value, dict):
        children = schema.get("properties", {})
        filled = {
            name: json.loads(json.dumps(child["default"]))
            for name, child in children.items()
            if "default" in child and name not in value
        }
        rest = schema.get("additionalProperties")
        rest = rest if isinstance(rest, dict) else {}
        return {name: with_defaults(children.get(name, rest), v) for name, v in (value | filled).items()}
    if isinstance(value, list):
        return [with_defaults(schema.get("items", {}), item) for item in value]
    return value


def complaints(schema: Object, value: Object) -> list[str]:
    """What strict server-side validation would say, defaults applied first."""
    validator = jsonschema.validators.extend(jsonschema.Draft202012Validator, {"x-keys": _unique_keys})
    filled = with_defaults(schema, value)
    return [f"{e.json_path}: {e.message}" for e in validator(schema).iter_errors(filled)]


def _unique_keys(_: Any, keys: list[str], items: Any, __: Any) -> Iterator[jsonschema.ValidationError]:
    seen = [tuple(item.get(key) for key in keys) for item in items]
    for twice in {key for key in seen if seen.count(key) > 1}:
        yield jsonschema.ValidationError(f"two entries with {dict(zip(keys, twice, strict=True))}")


def validate_builtin(value: Object) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the validator's own imports
        kubernetes_validate.validate(value, KUBERNETES, strict=True)


# --- RayService ----------------------------------------------------------------------------------------


def test_the_rayservice_is_valid_against_the_crd(rayservice, rayservice_schema):
    assert complaints(rayservice_schema, rayservice) == []


def worker(rayservice: Object) -> Object:
    return rayservice["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]


def misspell(rayservice: Object) -> None:
    rayservice["spec"]["rayClusterConfig"]["enableInTreeAutoscalling"] = True


def misspell_deep(rayservice: Object) -> None:
    worker(rayservice)["template"]["spec"]["containers"][0]["readynessProbe"] = {}


def no_template(rayservice: Object) -> None:
    del worker(rayservice)["template"]


def number_as_text(rayservice: Object) -> None:
    worker(rayservice)["maxReplicas"] = "4"


def unknown_choice(rayservice: Object) -> None:
    rayservice["spec"]["rayClusterConfig"]["autoscalerOptions"]["version"] = "v3"


def same_port_twice(rayservice: Object) -> None:
    ports = worker(rayservice)["template"]["spec"]["containers"][0]["ports"]
    ports.append({**ports[0], "protocol": "TCP"})  # equal only once the default protocol is filled in


@pytest.mark.parametrize("kustomization", ["overlays/gpu"], indirect=True)
@pytest.mark.parametrize(
    ("spoil", "where"),
    [
        (misspell, "enableInTreeAutoscalling"),
        (misspell_deep, "readynessProbe"),
        (no_template, "template"),
        (number_as_text, "maxReplicas"),
        (unknown_choice, "autoscalerOptions.version"),
        (same_port_twice, "ports"),
    ],
)
def test_a_spoilt_rayservice_is_refused(
    rayservice: Object, rayservice_schema: Object, spoil: Callable[[Object], None], where: str
):
    spoilt = copy.deepcopy(rayservice)
    spoil(spoilt)
    (complaint,) = complaints(rayservice_schema, spoilt)
    assert where in complaint


def cel_rules(schema: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every rule of the CRD that JSON Schema cannot say."""
    if isinstance(schema, dict):
        yield from ((path, r["rule"]) for r in schema.get("x-kubernetes-validations", []))
        for name, child in schema.get("properties", {}).items():
            yield from cel_rules(child, f"{path}.{name}")
        for name in ("items", "additionalProperties"):
            yield from cel_rules(schema.get(name), path)


def test_the_rules_that_the_crd_has_in_cel_hold(rayservice, rayservice_crd):
    found = set(cel_rules(rayservice_crd))
    unchanged = "self == oldSelf"  # about updates: nothing that a manifest alone could break
    managers = "self in ['ray.io/kuberay-operator', 'kueue.x-k8s.io/multikueue']"
    cluster = ".spec.rayClusterConfig"
    assert found == {
        (".spec.managedBy", unchanged), (".spec.managedBy", managers),
        (f"{cluster}.managedBy", unchanged), (f"{cluster}.managedBy", managers),
        (f"{cluster}.gcsFaultToleranceOptions.backend", unchanged),
    }, "the CRD has other rules now: hold the manifests against them here"  # fmt: skip
    allowed = {None, "ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"}
    assert rayservice["spec"].get("managedBy") in allowed
    assert rayservice["spec"]["rayClusterConfig"].get("managedBy") in allowed


# --- the rest ------------------------------------------------------------------------------------------


def test_the_builtin_objects_are_valid(objects):
    builtin = [o for o in objects if o["kind"] not in {"RayService", *FOREIGN}]
    assert builtin
    for value in builtin:
        validate_builtin(value)


def test_the_pods_are_valid(pods):
    for pod in pods.values():
        validate_builtin(pod)


@pytest.mark.parametrize("kustomization", ["overlays/gpu"], indirect=True)
def test_a_misspelt_field_of_a_builtin_object_is_refused(objects):
    (policy, *_) = [o for o in objects if o["kind"] == "NetworkPolicy"]
    policy["spec"]["podSelektor"] = policy["spec"].pop("podSelector")
    with pytest.raises(kubernetes_validate.ValidationError):
        validate_builtin(policy)


def test_the_serve_config_is_what_serve_takes(serve_config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # metrics_interval_s has no better place yet
        ServeDeploySchema.model_validate(serve_config)
