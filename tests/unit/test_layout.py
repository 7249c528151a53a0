"""The rules of the code base that no linter knows."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted([*ROOT.glob("app/**/*.py"), *ROOT.glob("actors/**/*.py")])
REMOTE = re.compile(r"\.remote\(")


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_says_what_it_owns(module):
    assert ast.get_docstring(ast.parse(module.read_text())), "a module opens with a docstring"


def test_remote_calls_are_made_in_handles_only():
    outside = [
        str(module.relative_to(ROOT))
        for module in MODULES
        if "handles" not in module.parts and REMOTE.search(module.read_text())
    ]
    assert outside == []


def test_nothing_unpickles_or_executes_data():
    """security.md: only JSON, msgpack and safetensors are read."""
    forbidden = {"pickle", "cloudpickle", "marshal", "shelve", "dill"}
    calls = {"torch.load", "yaml.load", "eval", "exec"}
    found = []
    for module in MODULES:
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.Import):
                found += [(module, alias.name) for alias in node.names if alias.name in forbidden]
            elif isinstance(node, ast.ImportFrom) and node.module in forbidden:
                found.append((module, node.module))
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in calls:
                found.append((module, ast.unparse(node.func)))
    assert found == []
