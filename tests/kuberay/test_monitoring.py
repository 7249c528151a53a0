"""Monitors, rules and dashboards: they ask for what is exported, and the rules say what they should.

Every expression is parsed (promql-parser), and every metric in it must be one that `actors.telemetry` or Ray exports.
Where promtool is at hand (`PROMTOOL`, or on PATH; .ci/run fetches it) the rules are also checked and unit-tested.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from ray.dashboard.modules.metrics import dashboards

from actors.telemetry import _METRICS

MONITORING = Path(__file__).parents[2] / "kuberay" / "components" / "monitoring"
Object = dict[str, Any]
pytestmark = pytest.mark.parametrize("kustomization", ["overlays/production"], indirect=True)


@pytest.fixture
def rules(objects: list[Object]) -> Object:
    (found,) = [o for o in objects if o["kind"] == "PrometheusRule"]
    return found["spec"]


@pytest.fixture
def dashboard(objects: list[Object]) -> Object:
    (found,) = [o for o in objects if o["metadata"]["name"] == "shoal-dashboards"]
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    return json.loads(found["data"]["shoal.json"])


def exported() -> dict[str, set[str] | None]:
    """Every series by name, with the labels we give it; None where they are Ray's."""
    found: dict[str, set[str] | None] = {"up": None}
    for name, (kind, _, labels) in _METRICS.items():
        for ending in ("_bucket", "_sum", "_count") if kind == "histogram" else ("",):
            found[f"ray_{name}{ending}"] = {*labels, "le"} if ending == "_bucket" else set(labels)
    for panels in Path(dashboards.__path__[0]).glob("*_panels.py"):  # Ray's own dashboards
        found |= dict.fromkeys(re.findall(r"ray_[a-z_0-9]+[a-z0-9]", panels.read_text()))
    return found


def selectors(expression: Any) -> Iterator[Any]:
    """Every vector selector in a parsed expression."""
    if isinstance(expression, promql_parser.VectorSelector):
        yield expression
    for name in ("expr", "lhs", "rhs", "vector_selector"):
        child = getattr(expression, name, None)
        if child is not None and not isinstance(expression, promql_parser.VectorSelector):
            yield from selectors(child)
    for child in getattr(expression, "args", None) or ():
        yield from selectors(child)


def wrong(expression: str, known: dict[str, set[str] | None]) -> list[str]:
    """The metrics and labels in an expression that nobody exports."""
    found = []
    parsed = promql_parser.parse(expression)
    asked = list(selectors(parsed))
    assert asked, expression
    for selector in asked:
        if selector.name not in known:
            found.append(selector.name)
            continue
        labels = known[selector.name]
        used = {matcher.name for matcher in selector.matchers.matchers}
        found += [
            f"{selector.name}{{{label}}}" for label in used if labels is not None and label not in labels
        ]
    return found


def test_every_rule_asks_for_metrics_that_are_exported(rules):
    known = exported()
    records = {r["record"]: None for g in rules["groups"] for r in g["rules"] if "record" in r}
    for group in rules["groups"]:
        for rule in group["rules"]:
            assert wrong(rule["expr"], known | records) == [], rule


def test_every_panel_asks_for_metrics_that_are_exported(dashboard):
    known = exported()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            expression = target["expr"].replace("$__rate_interval", "5m").replace("$model", ".*")
            assert wrong(expression, known) == [], panel["title"]


def test_every_metric_of_ours_is_on_the_dashboard(dashboard):
    text = json.dumps(dashboard)
    assert [name for name in _METRICS if f"ray_{name}" not in text] == []


@pytest.mark.parametrize(
    ("expression", "named"),
    [
        ("rate(ray_shoal_request_total[5m])", ["ray_shoal_request_total"]),
        ('ray_shoal_queue_depth{klass="batch"}', ["ray_shoal_queue_depth{klass}"]),
    ],
)
def test_a_misspelt_metric_or_label_is_found(kustomization, expression, named):
    assert wrong(expression, exported()) == named


def test_monitors_reach_every_port_that_a_ray_pod_exports_on(objects, pods, groups):
    monitors = [o["spec"] for o in objects if o["kind"] == "PodMonitor"]
    for name in groups:
        labels = pods[name]["metadata"]["labels"]
        scraped = [
            endpoint["port"]
            for m in monitors
            if m["selector"]["matchLabels"].items() <= labels.items()
            for endpoint in m["podMetricsEndpoints"]
        ]
        ports = {p["name"] for p in pods[name]["spec"]["containers"][0]["ports"]}
        wanted = ports & {"metrics", "as-metrics", "dash-metrics"}
        assert sorted(scraped) == sorted(wanted), name


def test_promtool_takes_the_rules_and_they_fire_when_they_should(rules, tmp_path):
    promtool = os.environ.get("PROMTOOL") or shutil.which("promtool")
    if not promtool:
        pytest.skip("promtool is not at hand: Debian's package `prometheus` has it; name it in PROMTOOL")
    (tmp_path / "rules.json").write_text(json.dumps(rules))  # JSON is YAML
    tests = MONITORING / "rules-test.yaml"
    shutil.copy(tests, tmp_path)
    for command in (["check", "rules", "rules.json"], ["test", "rules", tests.name]):
        result = subprocess.run(
            [promtool, *command], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr


def test_every_alert_has_a_test_in_which_it_fires(rules):
    alerts = {r["alert"] for g in rules["groups"] for r in g["rules"] if "alert" in r}
    tests = yaml.safe_load((MONITORING / "rules-test.yaml").read_text())["tests"]
    fired = {c["alertname"] for t in tests for c in t.get("alert_rule_test", []) if c["exp_alerts"]}
    assert fired == alerts
