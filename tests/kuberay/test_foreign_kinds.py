"""Objects of other operators, against the fields of their CRDs that we use: their files are not at hand here.

Each schema is closed: a misspelt field is refused, and a field that is new to the manifests has to be looked up and
added here. Sources: prometheus-operator's API reference (v1), the Gateway API's reference (v1).
"""

from __future__ import annotations

import copy
from typing import Any

import jsonschema
import pytest

Object = dict[str, Any]


def closed(required: str = "", **properties: Any) -> Object:
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def each(item: Object) -> Object:
    return {"type": "array", "items": item, "minItems": 1}


STRING = {"type": "string", "minLength": 1}
STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
DURATION = {"type": "string", "pattern": r"^(\d+(ms|s|m|h|d))+$"}
PORT = {"type": "integer", "minimum": 1, "maximum": 65535}
RELABELING = closed(
    "targetLabel",
    action={"enum": ["replace", "keep", "drop"]},
    sourceLabels=each({"type": "string", "pattern": "^[a-zA-Z_][a-zA-Z0-9_]*$"}),
    targetLabel=STRING,
)
KINDS = {
    ("monitoring.coreos.com/v1", "PodMonitor"): closed(
        "selector podMetricsEndpoints",
        selector=closed(matchLabels=STRINGS),
        podMetricsEndpoints=each(
            closed("port", port=STRING, interval=DURATION, path=STRING, relabelings=each(RELABELING))
        ),
    ),
    ("monitoring.coreos.com/v1", "PrometheusRule"): closed(
        "groups",
        groups=each(
            closed(
                "name rules",
                name=STRING,
                interval=DURATION,
                rules=each(
                    {
                        "oneOf": [
                            closed("record expr", record=STRING, expr=STRING, labels=STRINGS),
                            closed(
                                "alert expr",
                                alert=STRING,
                                expr=STRING,
                                labels=STRINGS,
                                annotations=STRINGS,
                                **{"for": DURATION},
                            ),
                        ]
                    }
                ),
            )
        ),
    ),
    ("gateway.networking.k8s.io/v1", "Gateway"): closed(
        "gatewayClassName listeners",
        gatewayClassName=STRING,
        listeners=each(
            closed(
                "name protocol port",
                name=STRING,
                protocol={"enum": ["HTTP", "HTTPS", "TLS"]},
                port=PORT,
                hostname=STRING,
                tls=closed(
                    "mode certificateRefs",
                    mode={"enum": ["Terminate", "Passthrough"]},
                    certificateRefs=each(closed("name", kind={"const": "Secret"}, name=STRING)),
                ),
                allowedRoutes=closed(namespaces=closed(**{"from": {"enum": ["Same", "All", "Selector"]}})),
            )
        ),
    ),
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): closed(
        "parentRefs rules",
        parentRefs=each(closed("name", name=STRING, sectionName=STRING)),
        hostnames=each(STRING),
        rules=each(
            closed(
                "backendRefs",
                matches=each(
                    closed(path=closed("type value", type={"enum": ["Exact", "PathPrefix"]}, value=STRING))
                ),
                timeouts=closed(request=DURATION, backendRequest=DURATION),
                backendRefs=each(closed("name port", name=STRING, port=PORT)),
            )
        ),
    ),
}


def check(value: Object) -> None:
    jsonschema.validate(value["spec"], KINDS[value["apiVersion"], value["kind"]])
    assert set(value) == {"apiVersion", "kind", "metadata", "spec"}


@pytest.fixture
def foreign(objects: list[Object]) -> list[Object]:
    return [o for o in objects if (o["apiVersion"], o["kind"]) in KINDS]


def test_objects_of_other_operators_have_known_fields_only(foreign):
    for value in foreign:
        check(value)


@pytest.mark.parametrize("kustomization", ["overlays/production"], indirect=True)
def test_production_has_all_of_them_and_a_misspelt_field_is_refused(foreign):
    assert {o["kind"] for o in foreign} == {kind for _, kind in KINDS}
    for value in foreign:
        spoilt = copy.deepcopy(value)
        spoilt["spec"]["selektor"] = {}
        with pytest.raises(jsonschema.ValidationError):
            check(spoilt)


@pytest.mark.parametrize("kustomization", ["overlays/production"], indirect=True)
def test_the_route_leads_to_the_service_that_the_operator_makes(foreign, objects, serve_config):
    by_kind = {o["kind"]: o["spec"] for o in foreign}
    (rule,) = by_kind["HTTPRoute"]["rules"]
    (service,) = [o["metadata"]["name"] for o in objects if o["kind"] == "RayService"]
    assert rule["backendRefs"] == [
        {"name": f"{service}-serve-svc", "port": serve_config["http_options"]["port"]}
    ]
    (gateway,) = [a for a in serve_config["applications"] if a["name"] == "gateway"]
    for timeout in rule["timeouts"].values():
        assert int(timeout.removesuffix("s")) > gateway["args"]["max_timeout_s"]
    (listener,) = by_kind["Gateway"]["listeners"]
    assert (listener["protocol"], listener["tls"]["mode"]) == ("HTTPS", "Terminate")
    (parent,) = by_kind["HTTPRoute"]["parentRefs"]
    assert parent["sectionName"] == listener["name"]
