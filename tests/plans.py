"""The plans that are kept as text: of the files in ``deployments/``, in their first lines, and of well-known models.

python -m tests.plans    writes them anew, after a change of what `omni-ray plan` prints
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from omni_ray.config.load import load
from omni_ray.config.spec import OmniSpec
from omni_ray.plan.fixes import find_fixes
from omni_ray.plan.inventory import parse_inventory
from omni_ray.plan.plan import make_plan
from omni_ray.plan.report import report

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tests/unit/plans"

CLUSTERS = {
    "one_24gb_gpu.yaml": ["1xRTX4090-24G"],
    "one_8gpu_node.yaml": ["8xH200-141G"],
    "two_8gpu_nodes.yaml": ["8xH100-80G x 2"],
}
"""The files in ``deployments/`` that open with their plan, and the nodes that it is for."""

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "flux2-dev": (
        "8xH200-141G",
        {"type": "dit", "source": "black-forest-labs/FLUX.2-dev", "parallel": {"tensor": 2, "ulysses": 2}},
    ),
    "qwen-image": (
        "4xH100-80G",
        {
            "type": "dit",
            "source": "Qwen/Qwen-Image",
            "parallel": {"cfg": 2},
            "num_replicas": 2,
            "compile": {"mode": "regional"},
        },
    ),
    "wan2.2-t2v-a14b": (
        "8xH100-80G x 2",
        {"type": "dit", "source": "Wan-AI/Wan2.2-T2V-A14B-Diffusers", "parallel": {"cfg": 2, "ulysses": 4}},
    ),
    "wan2.2-t2v-a14b-two-nodes": (
        "4xH100-80G x 2",
        {
            "type": "dit",
            "source": "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
            "parallel": {"ulysses": 8, "num_nodes": 2},
            "limits": {"max_pixels": 832 * 480, "max_frames": 81},
        },
    ),
    "hunyuanimage-3.0": (
        "8xH100-80G",
        {"type": "ar", "source": "tencent/HunyuanImage-3.0", "parallel": {"tensor": 4}},
    ),
    "qwen3-235b-a22b": (
        "8xA100-80G",
        {"type": "ar", "source": "Qwen/Qwen3-235B-A22B", "parallel": {"tensor": 8}, "engine_args": {}},
    ),
    "qwen3-235b-a22b-two-nodes": (
        "8xA100-40G x 2",
        {"type": "ar", "source": "Qwen/Qwen3-235B-A22B", "parallel": {"tensor": 8, "pipeline": 2, "num_nodes": 2}},
    ),
}


def plan_text(spec: OmniSpec, inventory: list[str]) -> str:
    """What ``omni-ray plan`` prints."""
    plan = make_plan(spec, parse_inventory(inventory))
    return report(plan, find_fixes(plan))


def model_text(name: str) -> str:
    inventory, model = MODELS[name]
    return plan_text(OmniSpec.model_validate({"models": [{"name": name, **model}]}), [inventory]) + "\n"


def comment(file: str) -> str:
    """The lines that a file of ``deployments/`` opens with: the command, and what it prints."""
    path, inventory = f"deployments/{file}", CLUSTERS[file]
    command = " ".join(["omni-ray plan", path, *(f"--inventory {shlex.quote(nodes)}" for nodes in inventory)])
    lines = ["$ " + command, "", *plan_text(load(ROOT / path)[0], inventory).splitlines()]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


def readme() -> str:
    """The README with its two examples written anew."""
    example = plan_text(load(ROOT / "deployments/one_24gb_gpu.yaml")[0], CLUSTERS["one_24gb_gpu.yaml"])
    refused = plan_text(load(ROOT / "deployments/one_8gpu_node.yaml")[0], ["8xH100-80G"])
    text = (ROOT / "README.md").read_text()
    text = re.sub(r"(?s)(```\n\$ omni-ray plan [^\n]*\n).*?\n```", lambda found: f"{found[1]}{example}\n```", text)
    return re.sub(r"(?s)```\nrefused: .*?\n```", lambda _: f"```\n{refused[refused.index('refused:') :]}\n```", text)


def write() -> None:
    (ROOT / "README.md").write_text(readme())
    for file in CLUSTERS:
        path = ROOT / "deployments" / file
        body = re.sub(r"\A(#.*\n)*\n*", "", path.read_text())
        path.write_text(f"{comment(file)}\n{body}")
    for name in MODELS:
        (FOLDER / f"{name}.txt").write_text(model_text(name))


if __name__ == "__main__":
    write()
