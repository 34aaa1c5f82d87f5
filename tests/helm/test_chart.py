"""The chart through a real Helm: what it renders is valid and serves the models, and what is wrong is named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

import omni_ray
from omni_ray.cli.environment import environment
from omni_ray.config import chart
from omni_ray.config.chart import ChartValues
from omni_ray.config.spec import OmniSpec
from tests.charts import CHART, FILES, MADE, ROOT, Helm, Kubernetes, find_helm, generated_values

Manifests = list[dict[str, Any]]

POD_DIFFERS = (
    "RAY_AUTH_MODE",
    "RAY_SERVE_HAPROXY_BINARY_PATH",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S",  # here are load balancers that have to forget a replica
)
"""Variables of `omni-ray env` that have another value in a pod, or none."""


@pytest.fixture(scope="module")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    folder = tmp_path_factory.mktemp("helm")
    return Helm(find_helm(folder), folder)


@pytest.fixture(scope="module")
def rendered(helm: Helm) -> dict[str, Manifests]:
    """What each values file becomes."""
    return {name: helm.render(path) for name, path in FILES.items()}


@pytest.fixture(scope="module")
def kubernetes() -> Kubernetes:
    return Kubernetes()


def only(manifests: Manifests, kind: str) -> dict[str, Any]:
    (found,) = (each for each in manifests if each["kind"] == kind)
    return found


def cluster(manifests: Manifests) -> dict[str, Any]:
    config: dict[str, Any] = only(manifests, "RayService")["spec"]["rayClusterConfig"]
    return config


def pods(manifests: Manifests) -> list[dict[str, Any]]:
    """The pod templates: the head's, then one of each group of workers."""
    config = cluster(manifests)
    return [config["headGroupSpec"]["template"], *(group["template"] for group in config["workerGroupSpecs"])]


def container(pod: dict[str, Any]) -> dict[str, Any]:
    (found,) = pod["spec"]["containers"]
    return dict(found)


def merged(name: str) -> dict[str, Any]:
    """The chart's values under those of a file; lists of the file replace those of the chart."""

    def merge(below: Any, above: Any) -> Any:
        if not (isinstance(below, dict) and isinstance(above, dict)):
            return above
        return below | {key: merge(below.get(key), value) for key, value in above.items()}

    return dict(merge(yaml.safe_load((CHART / "values.yaml").read_text()), yaml.safe_load(FILES[name].read_text())))


def serve_config(manifests: Manifests) -> dict[str, Any]:
    return dict(yaml.safe_load(only(manifests, "RayService")["spec"]["serveConfigV2"]))


def test_the_schema_is_current() -> None:
    text = (CHART / "values.schema.json").read_text()
    assert text == json.dumps(chart.schema(), indent=1) + "\n", "run `make docs`"


@pytest.mark.parametrize("name", MADE)
def test_values_files_are_what_the_command_prints(name: str) -> None:
    """`python -m tests.charts` writes them anew."""
    assert FILES[name].read_text() == generated_values(name)


def test_values_are_the_defaults_of_the_schema() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    made = ChartValues.model_validate({"args": values["args"]}).model_dump(exclude={"args"})
    worker = made["workers"][0]
    assert worker == chart.Workers(**values["workers"][0]).model_dump()
    assert values | {"workers": [worker]} == made | {"args": values["args"]}


def test_default_models_are_those_of_the_default_deployment() -> None:
    deployment = yaml.safe_load((ROOT / "deployments/omni.yaml").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert values["args"] == deployment["applications"][0]["args"]


def test_versions_are_those_of_the_package() -> None:
    about = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert about["version"] == about["appVersion"] == omni_ray.__version__
    assert f'"ray[serve]=={about["annotations"]["omni-ray/ray-version"]}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("name", FILES)
def test_is_linted(helm: Helm, name: str) -> None:
    ran = helm.run("lint", "--strict", str(CHART), "-f", str(FILES[name]))
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("name", FILES)
def test_is_valid_kubernetes(rendered: dict[str, Manifests], kubernetes: Kubernetes, name: str) -> None:
    assert [problem for manifest in rendered[name] for problem in kubernetes.problems(manifest)] == []


@pytest.mark.parametrize("name", FILES)
def test_serves_the_models_of_the_file(rendered: dict[str, Manifests], name: str) -> None:
    config = serve_config(rendered[name])
    schema = ServeDeploySchema.model_validate(config)
    assert [app.import_path for app in schema.applications] == ["omni_ray.app:build"]
    served, wanted = config["applications"][0]["args"], merged(name)["args"]
    if name == "ha":  # from the Secret, not from args
        mounts = [mount for mount in container(pods(rendered[name])[1])["volumeMounts"] if mount["name"] == "api-keys"]
        assert served["api"].pop("keys_file") == f"{mounts[0]['mountPath']}/keys"
    assert OmniSpec.model_validate(served) == OmniSpec.model_validate(wanted)
    assert served == wanted  # numbers, too, are as they were


@pytest.mark.parametrize("name", FILES)
def test_pods_have_what_they_need(rendered: dict[str, Manifests], name: str) -> None:
    for pod in pods(rendered[name]):
        ray = container(pod)
        env = {each["name"]: each.get("value") for each in ray["env"]}
        assert env["RAY_SERVE_ENABLE_HA_PROXY"] == env["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"
        assert env["RAY_SERVE_HAPROXY_BINARY_PATH"].endswith("/omni-ray-haproxy")
        ours = {name: value for name, value in environment().items() if name not in POD_DIFFERS}
        assert {name: env.get(name) for name in ours} == ours
        assert pod["spec"]["securityContext"]["runAsNonRoot"]
        assert not ray["securityContext"]["allowPrivilegeEscalation"]
        volumes = {each["name"]: each for each in pod["spec"]["volumes"]}
        assert {mount["name"] for mount in ray["volumeMounts"]} == volumes.keys()
        assert volumes["shared-memory"]["emptyDir"]["medium"] == "Memory"


@pytest.mark.parametrize("name", FILES)
def test_workers_follow_the_values(rendered: dict[str, Manifests], name: str) -> None:
    groups = cluster(rendered[name])["workerGroupSpecs"]
    for group, values in zip(groups, merged(name)["workers"], strict=True):
        wanted = chart.Workers(**values)
        ray = container(group["template"])
        assert (group["groupName"], group["replicas"]) == (wanted.name, wanted.replicas)
        assert group["maxReplicas"] == (wanted.maxReplicas or wanted.replicas)
        assert ray["resources"]["limits"].get("nvidia.com/gpu", 0) == wanted.gpus
        assert ray["resources"]["limits"]["memory"] == f"{wanted.memoryGiB}Gi"
        assert ray["image"].endswith("-gpu" if wanted.gpus else "-cpu")
        assert group["template"]["spec"].get("nodeSelector", {}) == wanted.nodeSelector
        assert int(group["rayStartParams"]["object-store-memory"]) == wanted.sharedMemoryGiB * 2**29
        cache = next(volume for volume in group["template"]["spec"]["volumes"] if volume["name"] == "cache")
        claim = only(rendered[name], "PersistentVolumeClaim")
        assert cache["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


def test_workers_wait_for_the_models_once(rendered: dict[str, Manifests], tmp_path: Path) -> None:
    """The probe asks /ready until it was 200, from then on the proxy: a model that fails later closes no other."""
    answers = {"/api/local_raylet_healthz": (200, b"success"), "/ready": (503, b"{}"), "/-/healthz": (200, b"success")}

    class Node(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answers[self.path]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    *_, script = container(pods(rendered["demo"])[1])["readinessProbe"]["exec"]["command"]
    with ThreadingHTTPServer(("127.0.0.1", 0), Node) as node:
        threading.Thread(target=node.serve_forever, daemon=True).start()
        for port in ("52365", "8000"):
            assert f'"{port}/' in script
            script = script.replace(f'"{port}/', f'"{node.server_port}/')
        script = script.replace("/tmp/", f"{tmp_path}/")

        def is_ready() -> bool:
            return subprocess.run([sys.executable, "-ISc", script], capture_output=True, timeout=30).returncode == 0

        assert not is_ready()
        answers["/ready"] = (200, b"{}")
        assert is_ready()
        answers["/ready"] = (503, b"{}")
        assert is_ready()
        answers["/-/healthz"] = (503, b"draining")
        assert not is_ready()
        answers |= {"/-/healthz": (200, b"success"), "/api/local_raylet_healthz": (200, b"raylet failed")}
        assert not is_ready()
        node.shutdown()


def test_a_new_chart_leaves_pods_as_they_are(helm: Helm, tmp_path: Path, rendered: dict[str, Manifests]) -> None:
    """KubeRay makes a new cluster when the pods change."""
    copy = tmp_path / "omni-ray"
    shutil.copytree(CHART, copy)
    about = yaml.safe_load((copy / "Chart.yaml").read_text())
    (copy / "Chart.yaml").write_text(yaml.safe_dump(about | {"version": "9.9.9"}))
    changed = helm.render(FILES["ha"], chart=copy)
    assert changed != rendered["ha"]
    assert cluster(changed) == cluster(rendered["ha"])


def test_high_availability(rendered: dict[str, Manifests]) -> None:
    service, manifests = only(rendered["ha"], "RayService")["spec"], rendered["ha"]
    assert service["upgradeStrategy"]["clusterUpgradeOptions"]["gatewayClassName"] == "istio"
    assert service["serveService"]["spec"]["type"] == "LoadBalancer"
    config = cluster(manifests)
    assert config["gcsFaultToleranceOptions"]["redisAddress"] == "redis.models:6379"
    assert config["authOptions"] == {"mode": "token"}
    assert config["enableInTreeAutoscaling"] is True
    assert only(manifests, "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1
    monitor, policy = only(manifests, "PodMonitor")["spec"], only(manifests, "NetworkPolicy")["spec"]
    for pod in pods(manifests):
        labels = pod["metadata"]["labels"].items()
        for selector in (monitor["selector"], policy["podSelector"]):
            assert selector["matchLabels"].items() <= labels
        ports = {port["name"]: port["containerPort"] for port in container(pod)["ports"]}
        assert container(pod)["envFrom"] == [{"secretRef": {"name": "jobs-database"}}]
        assert monitor["podMetricsEndpoints"][0]["port"] in ports
    open_to = {str(rule.get("from")): [port["port"] for port in rule.get("ports", [])] for rule in policy["ingress"]}
    assert [8000] in open_to.values()
    assert not any(8265 in ports for peers, ports in open_to.items() if "kuberay-operator" not in peers)


def test_defaults_ask_for_nothing_special(rendered: dict[str, Manifests]) -> None:
    """A laptop's kind cluster has no GPU, no Prometheus operator and no Redis."""
    assert {manifest["kind"] for manifest in rendered["demo"]} == {"RayService", "PersistentVolumeClaim"}
    assert not any("envFrom" in container(pod) for pod in pods(rendered["demo"]))
    requested = [container(pod)["resources"]["requests"] for pod in pods(rendered["demo"])]
    assert sum(int(each["memory"].removesuffix("Gi")) for each in requested) <= 12
    assert sum(each["cpu"] for each in requested) <= 4


def test_dashboards_are_taken_as_they_are(helm: Helm, tmp_path: Path) -> None:
    copy = tmp_path / "omni-ray"
    shutil.copytree(CHART, copy)
    dashboard = '{"title": "Load", "legend": "{{instance}}"}\n'
    (copy / "dashboards").mkdir(exist_ok=True)
    (copy / "dashboards/another.json").write_text(dashboard)
    found = helm.render(FILES["demo"], "--set", "metrics.dashboards.enabled=true", chart=copy)
    config_map = only(found, "ConfigMap")
    assert config_map["data"]["another.json"] == dashboard
    assert config_map["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_changes_in_place_are_handed_on(helm: Helm, tmp_path: Path) -> None:
    deployments = [{"name": "Router", "user_config": {"demo-image": {"queue": {"max_queued_requests": 8}}}}]
    values = tmp_path / "values.yaml"
    values.write_text(yaml.safe_dump({"deployments": deployments}))
    config = serve_config(helm.render(values))
    (application,) = config["applications"]
    assert application["deployments"] == deployments
    ServeDeploySchema.model_validate(config)


def test_notes_name_three_commands(helm: Helm) -> None:
    ran = helm.run("install", "release", str(CHART), "--dry-run=client", "--namespace", "models")
    assert ran.returncode == 0, ran.stderr
    notes = ran.stdout.partition("NOTES:")[2]
    commands = [line.strip() for line in notes.splitlines() if line.startswith("  ")]
    assert [command.split()[0] for command in commands] == ["kubectl", "kubectl", "curl"]
    assert "rayservice/release-omni-ray" in commands[0]
    assert "service/release-omni-ray-serve-svc 8000:8000" in commands[1]
    assert '"demo-chat"' in commands[2]


MODEL = {"name": "qwen", "type": "ar", "source": "Qwen/Qwen3-8B"}
FLUX = {"name": "flux", "type": "dit", "source": "black-forest-labs/FLUX.1-dev"}
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "a key of the chart": ({"worker": []}, "'worker' not allowed"),
    "a key of a group": ({"workers": [{"name": "a", "gpu": 8}]}, "at '/workers/0': additional properties 'gpu'"),
    "a key of a model": (
        {"args": {"models": [MODEL | {"num_replica": 2}]}},
        "at '/args/models/0': additional properties 'num_replica' not allowed",
    ),
    "a key within a model": (
        {"args": {"models": [FLUX | {"parallel": {"ulyses": 2}}]}},
        "at '/args/models/0/parallel': additional properties 'ulyses' not allowed",
    ),
    "a key of the edge": ({"args": {"api": {"replicas": 2}}}, "at '/args/api': additional properties 'replicas'"),
    "a type of model": ({"args": {"models": [MODEL | {"type": "llm"}]}}, "at '/args/models/0/type'"),
    "no source": ({"args": {"models": [{"name": "a", "type": "dit"}]}}, "missing property 'source'"),
    "no model": ({"args": {"models": []}}, "at '/args/models': minItems"),
    "a value out of its choices": (
        {"args": {"models": [FLUX | {"cache": {"kind": "teacash"}}]}},
        "at '/args/models/0/cache/kind'",
    ),
    "a value out of its bounds": (
        {"args": {"models": [MODEL | {"memory": {"gpu_memory_utilization": 90}}]}},
        "at '/args/models/0/memory/gpu_memory_utilization'",
    ),
    "text for a number": ({"workers": [{"name": "a", "gpus": "eight"}]}, "at '/workers/0/gpus'"),
    "an upgrade without a gateway": (
        {"upgrade": {"strategy": "NewClusterWithIncrementalUpgrade"}, "autoscaler": {"enabled": True}},
        "upgrade.gatewayClassName: is missing",
    ),
    "an upgrade without the autoscaler": (
        {"upgrade": {"strategy": "NewClusterWithIncrementalUpgrade", "gatewayClassName": "istio"}},
        "autoscaler.enabled: false",
    ),
    "GPUs for CPU builds": ({"workers": [{"name": "a", "gpus": 8}]}, "image.build: cpu, but workers[0].gpus is 8"),
    "two groups of a name": ({"workers": [{"name": "a"}, {"name": "a"}]}, 'workers[1].name: "a" is the name'),
    "bounds the wrong way round": (
        {"workers": [{"name": "a", "replicas": 2, "maxReplicas": 1}]},
        "workers[0].minReplicas: 2 is above maxReplicas 1",
    ),
    "more shared memory than memory": ({"head": {"sharedMemoryGiB": 3}}, "head.sharedMemoryGiB: 3 is part"),
    "a volume of one machine for several": ({"workers": [{"name": "a", "spread": True}]}, "cache.accessMode"),
    "a claim without a name": ({"cache": {"kind": "existingClaim"}}, "cache.existingClaim: is missing"),
    "a name that begins with a digit": ({"fullnameOverride": "2nd"}, "fullnameOverride: the release would be"),
    "no dashboards": ({"metrics": {"dashboards": {"enable": True}}}, "additional properties 'enable' not allowed"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_wrong_values_are_named(helm: Helm, tmp_path: Path, what: str) -> None:
    values, words = BROKEN[what]
    assert words in helm.refusal(values, tmp_path)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.upgradeStrategies", {}),
        ("spec.rayClusterConfig.headGroupSpecs", {}),
        ("spec.rayClusterConfig.workerGroupSpecs.0.replica", 1),
        ("spec.rayClusterConfig.workerGroupSpecs.0.template.spec.nodeSelectors", {}),
        ("spec.rayClusterConfig.workerGroupSpecs.0.template.spec.containers.0.readinessProbe.exec.commands", []),
        ("spec.serveConfigV2", {"applications": []}),
    ],
)
def test_schemas_are_strict(rendered: dict[str, Manifests], kubernetes: Kubernetes, path: str, value: Any) -> None:
    """A manifest with one wrong field is refused, so that a valid one says something."""
    broken = json.loads(json.dumps(only(rendered["demo"], "RayService")))
    place, *keys = [broken], *path.split(".")
    holder: Any = place[0]
    for key in keys[:-1]:
        holder = holder[int(key)] if key.isdigit() else holder[key]
    holder[keys[-1]] = value
    assert [problem for problem in kubernetes.problems(broken) if keys[-1] in problem]
