"""``omni-ray helm-values FILE``: the values of the Helm chart that follow from a file and its plan."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from omni_ray.cli.plan import plans_of
from omni_ray.config.document import read_yaml
from omni_ray.config.load import load_file
from omni_ray.config.serve_file import HttpOptions, OmniApplication, ServeFile
from omni_ray.errors import ConfigError
from omni_ray.plan.plan import Plan
from omni_ray.plan.pods import cache_gib, worker_groups

MIN_PORT = 1024


def helm_values(path: str, inventory: Sequence[str]) -> int:
    """Print the values file. Raises ConfigError where the file cannot be served, or not everything fits."""
    print(values_file(path, inventory), end="")
    return 0


def values_file(path: str, inventory: Sequence[str]) -> str:
    """The command, and as YAML what differs from the chart's own values. Raises ConfigError as `helm_values` does."""
    file = load_file(path)
    application = _only(file, path)
    plans = plans_of([application.args], inventory)
    if refusals := [str(refusal) for each in plans for refusal in each.refusals]:
        raise ConfigError("\n".join([*refusals, "`omni-ray plan` with the same arguments says what would make it fit"]))
    # As they are in the file, which a model's dump would reorder.
    args = read_yaml(Path(path)).data["applications"][0]["args"]
    in_place = {"deployments": application.deployments} if application.deployments else {}
    values = {"args": args} | in_place | _beside_args(file, plans)
    command = " ".join(["omni-ray helm-values", path, *(f"--inventory {shlex.quote(nodes)}" for nodes in inventory)])
    return f"# $ {command}\n\n" + yaml.safe_dump(values, sort_keys=False, width=120)


def _http(options: HttpOptions) -> dict[str, float]:
    """`http` of the chart. Raises ConfigError for a port that a user without rights cannot listen at."""
    if options.port < MIN_PORT:
        raise ConfigError(f"http_options.port: {options.port} is below {MIN_PORT}, which needs rights that pods lack")
    http: dict[str, float] = {"port": options.port} if "port" in options.model_fields_set else {}
    return http | ({"requestTimeoutSeconds": options.request_timeout_s} if options.request_timeout_s else {})


def _only(file: ServeFile, path: str) -> OmniApplication:
    if len(file.applications) == 1 and file.omni_applications:
        return file.omni_applications[0]
    names = ", ".join(application.name for application in file.applications)
    raise ConfigError(f"{path} has the applications {names}; a release of the chart serves one, which is omni_ray's")


def _beside_args(file: ServeFile, plans: Sequence[Plan]) -> dict[str, Any]:
    workers = worker_groups(plans)
    least = sum(group["replicas"] for group in workers)
    most = sum(group.get("maxReplicas", group["replicas"]) for group in workers)
    values: dict[str, Any] = {
        "image": {"build": "gpu" if any("gpus" in group for group in workers) else "cpu"},
        "workers": workers,
        "cache": {"size": f"{cache_gib(plans)}Gi"},
    }
    if most > 1:
        values["cache"] |= {"accessMode": "ReadWriteMany", "keep": True}
    if least < most:
        values["autoscaler"] = {"enabled": True}
    return values | ({"http": http} if (http := _http(file.http_options)) else {})
