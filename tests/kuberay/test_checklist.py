"""What KubeRay does not check and experience asks for, on every rendered kustomization."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes.utils.quantity import parse_quantity

from actors.ready_gate import ReadyGateConfig
from tests.kuberay.conftest import OVERLAYS, PRODUCTION

ROOT = Path(__file__).parents[2]
Object = dict[str, Any]
GPUS = ("nvidia.com/gpu", "nvidia.com/mig-1g.10gb")
overlays = pytest.mark.parametrize("kustomization", OVERLAYS, indirect=True)
production = pytest.mark.parametrize("kustomization", PRODUCTION, indirect=True)
LONGEST_NAME = 47  # of a RayService; the operator makes pod names of it


def containers(pod: Object) -> list[Object]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def ray_container(pod: Object) -> Object:
    return pod["spec"]["containers"][0]


@pytest.fixture
def ray_pods(pods: dict[str, Object], groups: dict[str, Object]) -> dict[str, Object]:
    return {name: pods[name] for name in groups}


# --- pods ----------------------------------------------------------------------------------------------


def test_every_mount_has_its_volume_and_every_volume_a_mount(pods):
    # A mount without a volume passes every API server and fails when the pod is made.
    for name, pod in pods.items():
        volumes = {volume["name"] for volume in pod["spec"].get("volumes", [])}
        mounts = {m["name"] for c in containers(pod) for m in c.get("volumeMounts", [])}
        assert mounts == volumes, name


def test_requests_never_pass_limits_and_memory_is_reserved(pods):
    for name, pod in pods.items():
        for container in containers(pod):
            requests, limits = container["resources"]["requests"], container["resources"]["limits"]
            for resource, amount in requests.items():
                assert parse_quantity(amount) <= parse_quantity(limits[resource]), (name, resource)
            assert {"cpu", "memory"} <= set(requests), name


def test_containers_may_do_nothing_they_need_not(pods):
    for name, pod in pods.items():
        security = pod["spec"]["securityContext"]
        assert security["runAsNonRoot"] is True, name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
        for container in containers(pod):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, name


def test_only_the_head_gets_a_service_account_token(pods):
    for name, pod in pods.items():
        assert (pod["spec"].get("automountServiceAccountToken") is False) == (name != "head"), name


def test_probed_and_named_ports_exist_once(pods):
    for name, pod in pods.items():
        for container in containers(pod):
            names = [port["name"] for port in container["ports"]]
            assert len(names) == len(set(names)), name
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                port = container.get(probe, {}).get("httpGet", {}).get("port")
                assert not isinstance(port, str) or port in names, (name, probe)


def test_ray_pods_have_all_three_probes(ray_pods):
    for name, pod in ray_pods.items():
        assert {"startupProbe", "livenessProbe", "readinessProbe"} <= set(ray_container(pod)), name


def test_ray_pods_never_restart_in_place(ray_pods):
    for name, pod in ray_pods.items():
        assert pod["spec"]["restartPolicy"] == "Never", name  # the autoscaler v2 asks for it


def test_the_head_names_the_ports_that_the_operator_looks_for(ray_pods):
    ports = {port["name"] for port in ray_container(ray_pods["head"])["ports"]}
    assert {"serve", "dashboard", "gcs-server", "metrics", "as-metrics", "dash-metrics"} <= ports


def test_config_maps_and_claims_that_pods_name_are_rendered(pods, objects):
    made = {(o["kind"], o["metadata"]["name"]) for o in objects}
    for name, pod in pods.items():
        for container in containers(pod):
            for source in container.get("envFrom", []):
                assert ("ConfigMap", source["configMapRef"]["name"]) in made, name
        for volume in pod["spec"].get("volumes", []):
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            own = volume["name"] == claim  # of a volumeClaimTemplate
            assert claim is None or own or ("PersistentVolumeClaim", claim) in made, name


def test_no_secret_is_rendered(objects):
    assert [o["metadata"]["name"] for o in objects if o["kind"] == "Secret"] == []


# --- Ray -----------------------------------------------------------------------------------------------


def test_nothing_of_ours_runs_on_the_head(groups):
    params = groups["head"]["rayStartParams"]
    assert (params["num-cpus"], params["num-gpus"]) == ("0", "0")


@pytest.mark.parametrize("kustomization", ["base", *PRODUCTION], indirect=True)
def test_the_head_of_production_has_memory_that_nobody_takes_away(ray_pods):
    resources = ray_container(ray_pods["head"])["resources"]
    assert resources["requests"]["memory"] == resources["limits"]["memory"]
    assert parse_quantity(resources["limits"]["memory"]) >= parse_quantity("8Gi")


def test_the_head_survives_and_outlives_others(rayservice, ray_pods, objects):
    cluster = rayservice["spec"]["rayClusterConfig"]
    fault_tolerance = cluster["gcsFaultToleranceOptions"]
    assert fault_tolerance["redisAddress"]
    assert "secretKeyRef" in fault_tolerance["redisPassword"]["valueFrom"]
    priority = ray_pods["head"]["spec"]["priorityClassName"]
    assert priority in {o["metadata"]["name"] for o in objects if o["kind"] == "PriorityClass"}
    budgets = [o["spec"] for o in objects if o["kind"] == "PodDisruptionBudget"]
    labels = ray_pods["head"]["metadata"]["labels"]
    covering = [b for b in budgets if b["selector"]["matchLabels"].items() <= labels.items()]
    assert [b["maxUnavailable"] for b in covering] == [0]


def test_every_worker_is_under_one_disruption_budget(ray_pods, objects):
    budgets = [o["spec"]["selector"]["matchLabels"] for o in objects if o["kind"] == "PodDisruptionBudget"]
    for name, pod in ray_pods.items():
        assert sum(b.items() <= pod["metadata"]["labels"].items() for b in budgets) == 1, name


def test_worker_groups_are_bounded(groups):
    for name, group in groups.items():
        if name == "head":
            continue
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] <= 100, name
        has_gpu = not set(GPUS).isdisjoint(ray_container(group["template"])["resources"]["limits"])
        assert not has_gpu or group["minReplicas"] == 0, name
    assert groups["cpu"]["minReplicas"] >= 2


def test_ray_asks_for_one_fixed_token(rayservice):
    auth = rayservice["spec"]["rayClusterConfig"]["authOptions"]
    assert auth == {"mode": "token", "secretName": "shoal-ray-auth"}


@production
def test_the_autoscaler_is_named_in_version_two_and_every_group_gives_its_nodes_back(rayservice, groups):
    cluster = rayservice["spec"]["rayClusterConfig"]
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"
    for name, group in groups.items():
        assert name == "head" or group["idleTimeoutSeconds"] > 0, name


def test_groups_with_gpus_are_one_per_kind_of_gpu_and_can_be_asked_for_by_label(groups):
    pools = {}
    for name, group in groups.items():
        limits = ray_container(group["template"])["resources"]["limits"]
        kinds = [kind for kind in limits if kind in GPUS]
        assert len(kinds) <= 1, name
        if kinds:
            assert limits[kinds[0]] == "1", name
            assert pools.setdefault(kinds[0], group["labels"]["shoal.io/pool"]) == name
            mounts = {m["name"]: m for m in ray_container(group["template"])["volumeMounts"]}
            assert mounts["weights"]["readOnly"] is True, name
    assert len(set(pools.values())) == len(pools)


def test_nothing_is_fetched_when_a_pod_runs(ray_env, serve_config):
    assert ray_env["HF_HUB_OFFLINE"] == "1"
    assert "runtime_env" not in str(serve_config)
    for application in serve_config["applications"]:
        model = application["args"].get("engine", {}).get("vllm", {}).get("model", "/")
        assert model.startswith(("/", "package:")), application["name"]


def test_proxies_stand_on_every_node(serve_config):
    assert serve_config["proxy_location"] == "EveryNode"  # HeadOnly leaves workers NotReady (kuberay#4994)


# --- an upgrade leaves no moment without an endpoint --------------------------------------------------------


def test_the_head_takes_no_traffic(rayservice):
    assert rayservice["spec"]["excludeHeadPodFromServeSvc"] is True


def test_a_cluster_runs_only_when_its_workers_are_endpoints(serve_config, groups):
    """`ready` holds back "all applications run" for longer than a pod needs to become Ready."""
    last = serve_config["applications"][-1]
    assert (last["name"], last["import_path"]) == ("ready", "app.main:build_ready")
    config = ReadyGateConfig(**last["args"])
    probe = ray_container(groups["cpu"]["template"])["readinessProbe"]
    assert probe.get("successThreshold", 1) == 1
    assert config.hold_s >= probe["periodSeconds"] + probe["timeoutSeconds"]
    assert probe["httpGet"] == {"path": "/-/healthz", "port": "serve"}
    assert {"name": "serve", "containerPort": config.port} in ray_container(groups["cpu"]["template"])[
        "ports"
    ]
    (gateway,) = [d for a in serve_config["applications"] for d in a["deployments"] if d["name"] == "Gateway"]
    assert config.nodes <= gateway["num_replicas"] <= groups["cpu"]["minReplicas"]


# --- KubeRay's own rules (ray-operator/controllers/ray/utils/validation.go, 1.7) ----------------------------


def test_the_operator_would_take_the_rayservice(rayservice, groups):
    cluster = rayservice["spec"]["rayClusterConfig"]
    scaled = cluster.get("enableInTreeAutoscaling", False)
    assert "ray.io/ft-enabled" not in rayservice["metadata"].get("annotations", {})
    assert tuple(map(int, cluster["rayVersion"].split("."))) >= (2, 52, 0)  # for authOptions.mode: token
    managed = {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME", "RAY_enable_autoscaler_v2"}
    assert managed.isdisjoint(e["name"] for e in ray_container(groups["head"]["template"]).get("env", []))
    assert {"redis-password", "redis-username"}.isdisjoint(groups["head"]["rayStartParams"])
    assert set(cluster["gcsFaultToleranceOptions"]) <= {"redisAddress", "redisPassword"}
    names = [g["groupName"] for g in cluster["workerGroupSpecs"]]
    assert len(names) == len(set(names))
    for name, group in groups.items():
        assert {"labels", "resources"}.isdisjoint(group["rayStartParams"]), name
        assert group["template"]["spec"]["restartPolicy"] == "Never", name
        if name != "head":
            assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", name)
            assert 0 <= group["minReplicas"] <= group["maxReplicas"], name
            assert scaled or {"idleTimeoutSeconds", "priority"}.isdisjoint(group), name
            assert not group.get("suspend"), name
    # The incremental upgrade needs autoscaling and a Gateway, and is beta: not used.
    assert rayservice["spec"]["upgradeStrategy"] == {"type": "NewCluster"}


def test_names_are_short_enough_for_what_the_operator_makes_of_them(objects, groups):
    for value in objects:
        assert len(value["metadata"]["name"]) <= LONGEST_NAME
    for name in groups:
        assert len(name) <= LONGEST_NAME


def test_head_and_workers_share_haproxys_variables(groups, ray_env):
    sources = {name: ray_container(g["template"])["envFrom"] for name, g in groups.items()}
    assert len({str(source) for source in sources.values()}) == 1
    env = ray_env
    assert env["RAY_SERVE_ENABLE_HA_PROXY"] == env["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"
    folder = "/run/shoal/"
    for variable in ("SOCKET_PATH", "METRICS_SOCKET_PATH", "CONFIG_FILE_LOC", "SERVER_STATE_FILE"):
        assert env[f"RAY_SERVE_HAPROXY_{variable}"].startswith(folder), variable
    for name, group in groups.items():
        mounts = {m["name"]: m["mountPath"] for m in ray_container(group["template"])["volumeMounts"]}
        assert mounts["run"] + "/" == folder, name


def test_pods_and_proxies_wait_for_the_longest_stream(serve_config, rayservice, ray_pods, ray_env):
    (gateway,) = [a for a in serve_config["applications"] if a["name"] == "gateway"]
    longest_s = gateway["args"]["max_timeout_s"]
    assert int(ray_env["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]) > longest_s
    assert rayservice["spec"]["rayClusterDeletionDelaySeconds"] > longest_s
    assert serve_config["http_options"]["request_timeout_s"] >= longest_s
    for name, pod in ray_pods.items():
        assert pod["spec"]["terminationGracePeriodSeconds"] > longest_s, name


def test_workers_drain_before_they_go(ray_pods, serve_config):
    (gateway,) = [a for a in serve_config["applications"] if a["name"] == "gateway"]
    dockerfile = (ROOT / "kuberay" / "Dockerfile").read_text()
    for name, pod in ray_pods.items():
        if name == "head":
            continue
        command, seconds = ray_container(pod)["lifecycle"]["preStop"]["exec"]["command"]
        assert f"/bin/{command}" in dockerfile
        grace_s = pod["spec"]["terminationGracePeriodSeconds"]
        assert gateway["args"]["max_timeout_s"] < int(seconds) < grace_s, name


@pytest.fixture
def drain(tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts the preStop script beside a `ray` that only says what it was asked, on a /proc of files."""
    fake = tmp_path / "ray"
    fake.write_text('#!/bin/sh\necho "$@"\n')
    fake.chmod(0o755)
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        command = ["bash", ROOT / "kuberay" / "drain.sh", "930"]
        env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PROC": str(tmp_path / "proc")}
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("left", ["replica", "client"])
def test_the_drain_script_waits_for_replicas_and_for_clients_of_the_proxy(left, drain, tmp_path):
    replica, sockets = tmp_path / "proc" / "17" / "cmdline", tmp_path / "proc" / "net" / "tcp"
    for path in (replica, sockets):
        path.parent.mkdir(parents=True)
    (sockets.parent / "tcp6").write_text("")
    replica.write_text("ray::ServeReplica:m1" if left == "replica" else "ray::IDLE")
    row = "0: 0100007F:1F40 0100007F:D431 {} 00000000:00000000"  # local port 8000
    sockets.write_text(
        row.format("01" if left == "client" else "06")
    )  # established, or waiting to be forgotten
    script = drain()
    with pytest.raises(subprocess.TimeoutExpired):
        script.wait(1.5)
    replica.write_text("ray::IDLE")
    sockets.write_text(row.format("06"))
    assert script.wait(10) == 0
    assert script.stdout is not None
    said = script.stdout.read()
    assert "drain-node" in said
    assert "--deadline-remaining-seconds 930" in said


# --- the network ---------------------------------------------------------------------------------------


def policies_of(objects: list[Object], pod: Object) -> list[Object]:
    labels = pod["metadata"]["labels"]
    return [
        o["spec"]
        for o in objects
        if o["kind"] == "NetworkPolicy"
        and o["spec"]["podSelector"].get("matchLabels", {}).items() <= labels.items()
        and "matchExpressions" not in o["spec"]["podSelector"]
    ]


@overlays
def test_nothing_reaches_a_ray_pod_unless_a_policy_says_so(ray_pods, objects):
    for name, pod in ray_pods.items():
        policies = policies_of(objects, pod)
        denied = [p for p in policies if set(p["policyTypes"]) == {"Ingress", "Egress"} and len(p) == 2]
        assert len(denied) == 1, name


@overlays
def test_only_ray_pods_reach_rays_ports(ray_pods, objects):
    # 30000-31000 (replicas), 9101 and 8404 (HAProxy), 6379, 10001, 52365: pickled code or secrets in clear.
    open_to_others = {8000, 8265, 8080, 44217, 44227}
    ours = {"shoal.io/system": "shoal"}
    for name, pod in ray_pods.items():
        for policy in policies_of(objects, pod):
            for rule in policy.get("ingress", []):
                inside = all(p.get("podSelector", {}).get("matchLabels") == ours for p in rule["from"])
                ports = {port["port"] for port in rule.get("ports", [])}
                assert inside or (ports and ports <= open_to_others), name
                assert 8265 not in ports or name == "head"


@overlays
def test_dns_and_the_operator_are_let_through(ray_pods, objects):
    for name, pod in ray_pods.items():
        rules = [r for p in policies_of(objects, pod) for r in p.get("egress", [])]
        assert any({"protocol": "UDP", "port": 53} in r.get("ports", []) for r in rules), name
    head = [r for p in policies_of(objects, ray_pods["head"]) for r in p.get("ingress", [])]
    (operator,) = [r for r in head if {"protocol": "TCP", "port": 8265} in r.get("ports", [])]
    selector = {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}}
    assert [peer["podSelector"] for peer in operator["from"]] == [selector]
