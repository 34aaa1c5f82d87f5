"""Plans: what is placed where, how fast it is, and the texts that are kept of them."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from omni_ray.config.load import load
from omni_ray.config.spec import DitParallel, OmniSpec
from omni_ray.errors import ConfigError
from omni_ray.plan.checkpoint import read_checkpoint
from omni_ray.plan.fixes import find_fixes
from omni_ray.plan.inventory import Node, local_inventory, parse_inventory, unknown_node
from omni_ray.plan.linear import Transformer
from omni_ray.plan.parts import parts_of
from omni_ray.plan.placement import Free
from omni_ray.plan.plan import GroupPlan, Plan, make_plan
from omni_ray.plan.report import report
from omni_ray.plan.seconds import sent_bytes
from tests import plans

ROOT = Path(__file__).parents[2]
MAX_S = 3.0
FLUX = {"name": "flux", "type": "dit", "source": "black-forest-labs/FLUX.1-dev"}
QWEN_IMAGE = {"name": "qwen-image", "type": "dit", "source": "Qwen/Qwen-Image"}
Z_IMAGE = {"name": "z-image", "type": "dit", "source": "Tongyi-MAI/Z-Image-Turbo"}
QWEN3 = {"name": "qwen3", "type": "ar", "source": "Qwen/Qwen3-8B"}


def plan_of(*models: dict[str, Any], inventory: str = "8xH200-141G") -> Plan:
    return make_plan(OmniSpec.model_validate({"models": models}), parse_inventory([inventory]))


def only(plan: Plan) -> GroupPlan:
    assert not plan.refusals
    return plan.groups[0]


@pytest.mark.parametrize("name", plans.MODELS)
def test_golden(name: str) -> None:
    """`python -m tests.plans` writes the files anew."""
    assert plans.model_text(name) == (plans.FOLDER / f"{name}.txt").read_text()


@pytest.mark.parametrize("file", plans.CLUSTERS)
def test_deployments_open_with_their_plan(file: str) -> None:
    """`python -m tests.plans` writes the comments anew."""
    assert (ROOT / "deployments" / file).read_text().startswith(plans.comment(file) + "\n")
    assert plans.comment(file).endswith("# everything fits\n")


def test_the_readme_shows_what_is_printed() -> None:
    text = (ROOT / "README.md").read_text()
    assert "```\n$ omni-ray plan " in text
    assert "```\nrefused: " in text
    assert plans.readme() == text


def test_the_command_is_quick_and_light() -> None:
    """Without torch, Ray or a model library, and in under three seconds of a processor."""
    code = (
        "import sys\n"
        "from omni_ray.cli.plan import plan\n"
        "plan('deployments/two_8gpu_nodes.yaml', ['8xH100-80G x 2'])\n"
        "heavy = {'torch', 'ray', 'vllm', 'diffusers', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime) < MAX_S
    printed = "".join(f"# {line}".rstrip() + "\n" for line in done.stdout.splitlines())
    assert plans.comment("two_8gpu_nodes.yaml").endswith(printed)


OWN = {"attention": {"backend": "native"}}
COMPILED = {"compile": {"mode": "regional"}, **OWN}
EAGER = {"compile": {"mode": "none"}, **OWN}
FP8 = {"quantization": {"kind": "fp8"}}
NO_STEPS = 10_000  # so many that text encoders and decode do not count


@pytest.mark.parametrize(
    ("model", "card", "measured_ms"),
    [
        (FLUX | EAGER, "H200-141G", 176),
        (FLUX | COMPILED, "H200-141G", 134),
        (QWEN_IMAGE | EAGER, "H200-141G", 172),
        (QWEN_IMAGE | COMPILED, "H200-141G", 132),
        (Z_IMAGE | EAGER, "H200-141G", 154),
        (Z_IMAGE | COMPILED, "H200-141G", 100),
    ],
)
def test_milliseconds_of_a_forward(model: dict[str, Any], card: str, measured_ms: float) -> None:
    """Stock diffusers 0.42.1, bfloat16, 1024x1024."""
    defaults = {"num_inference_steps": NO_STEPS}
    if model["name"] == "z-image":
        defaults["guidance_scale"] = 0
    need = only(plan_of(model | {"defaults": defaults}, inventory=f"1x{card}")).need
    assert need
    assert need.estimate
    assert need.estimate.seconds / NO_STEPS * 1000 == pytest.approx(measured_ms, rel=0.15)


@pytest.mark.parametrize(
    ("model", "measured_ms"),
    [
        (FLUX, 126.6),
        (QWEN_IMAGE, 134.3),
        (Z_IMAGE, 94.7),
        (FLUX | FP8, 89.2),
        (QWEN_IMAGE | FP8, 100.1),
        (Z_IMAGE | FP8, 63.0),
    ],
)
def test_milliseconds_of_a_forward_as_it_is_served(model: dict[str, Any], measured_ms: float) -> None:
    """`python -m benchmarks.forward`, an H100, compiled, CUDA graphs, 1024x1024."""
    defaults = {"num_inference_steps": NO_STEPS} | ({"guidance_scale": 0} if model["name"] == "z-image" else {})
    need = only(plan_of(model | {"defaults": defaults}, inventory="1xH100-80G")).need
    assert need
    assert need.estimate
    assert need.estimate.seconds / NO_STEPS * 1000 == pytest.approx(measured_ms, rel=0.15)


@pytest.mark.parametrize(("model", "measured_s"), [(FLUX | EAGER, 5.52), (QWEN_IMAGE | EAGER, 5.83)])
def test_seconds_of_an_image_on_an_h100(model: dict[str, Any], measured_s: float) -> None:
    """`python -m benchmarks.overhead dit`, plain diffusers, eager, 28 steps, without guidance."""
    need = only(plan_of(model | {"defaults": {"num_inference_steps": 28}}, inventory="1xH100-80G")).need
    assert need
    assert need.estimate
    assert need.estimate.seconds == pytest.approx(measured_s, rel=0.15)


@pytest.mark.parametrize(
    ("model", "more", "published_s"),
    [
        (FLUX | COMPILED, {"parallel": {"ulysses": 4}}, 1.63),  # xDiT, 28 steps
        (FLUX | COMPILED, {"parallel": {"ulysses": 2}, "defaults": {"num_inference_steps": 50}}, 4.24),  # SGLang
        (QWEN_IMAGE | COMPILED, {"parallel": {"cfg": 2}}, 6.7),  # SGLang, 50 steps
    ],
)
def test_seconds_on_several_h100s(model: dict[str, Any], more: dict[str, Any], published_s: float) -> None:
    """Others' figures. SGLang attends with FlashAttention 3, xDiT's run is PyTorch's default."""
    backend = {} if published_s < 2 else {"attention": {"backend": "_flash_3"}}
    need = only(plan_of(model | more | backend, inventory="4xH100-80G")).need
    assert need
    assert need.estimate
    assert need.estimate.seconds == pytest.approx(published_s, rel=0.15)


@pytest.mark.parametrize(
    ("source", "tokens", "sent_mb"),
    [
        ("black-forest-labs/FLUX.1-dev", (4096, 512), (706, 2825, 3765, 1143)),
        ("Qwen/Qwen-Image", (4096, 64), (671, 2684, 5367, 1342)),
        ("Wan-AI/Wan2.2-T2V-A14B-Diffusers", (75600, 512), (13556, 54199, 162634, 34853)),
    ],
)
def test_bytes_that_the_axes_move(source: str, tokens: tuple[int, int], sent_mb: tuple[int, ...]) -> None:
    """As `python -m benchmarks.traffic` counts them at the collectives of the real models."""
    model = next(part.model for part in parts_of(read_checkpoint(source)) if part.role == "transformer")
    assert isinstance(model, Transformer)
    axes = [{"ulysses": 8}, {"ring": 8}, {"tensor": 8}, {"tensor": 2, "ulysses": 4}]
    counted = [sent_bytes(DitParallel(**degrees), model, *tokens) / 1e6 for degrees in axes]
    assert counted == pytest.approx(sent_mb, rel=0.01)


def test_tflop_of_a_forward() -> None:
    """As diffusers' profiler and cache-dit count them."""
    for model, tflop in ((FLUX, 74.4), (QWEN_IMAGE, 69.3), (Z_IMAGE, 55.6)):
        need = only(plan_of(model)).need
        assert need
        assert need.estimate
        assert need.estimate.tflop == pytest.approx(tflop, rel=0.01)


def test_tokens_per_second_bound_what_vllm_reaches() -> None:
    """183 tokens/s were measured for one request of Qwen3-8B on an H200."""
    need = only(plan_of(QWEN3)).need
    assert need
    assert need.tokens_per_s
    assert 183 < need.tokens_per_s < 2 * 183


def test_guidance_costs_a_forward_a_step_and_cfg_2_takes_it_back() -> None:
    guided = {"defaults": {"negative_prompt": " "}}
    plain, serial, parallel = (
        only(plan_of(QWEN_IMAGE | more)).need for more in ({}, guided, guided | {"parallel": {"cfg": 2}})
    )
    assert plain
    assert serial
    assert parallel
    assert plain.estimate
    assert serial.estimate
    assert parallel.estimate
    assert [each.estimate.forwards for each in (plain, serial, parallel)] == [50, 100, 50]


def test_replicas_fill_nodes_and_gangs_stay_inside_one() -> None:
    plan = plan_of(FLUX | {"num_replicas": 3}, QWEN_IMAGE | {"parallel": {"ulysses": 4}}, inventory="4xH100-80G x 2")
    small, gang = plan.groups
    assert not plan.refusals
    assert {node.name for seat in gang.seats for node in seat.nodes} == {"node-0"}
    assert [(seat.nodes[0].name, seat.gpus) for seat in small.seats] == [("node-1", ((i,),)) for i in range(3)]
    assert gang.placement.bundles == [{"CPU": 0.5, "GPU": 1.0}] * 4
    assert gang.placement.strategy == "STRICT_PACK"


def test_ranks_that_share_gpus() -> None:
    plan = only(plan_of(Z_IMAGE | {"num_gpus": 0.5, "num_replicas": 3}, inventory="2xH200-141G"))
    assert [seat.gpus for seat in plan.seats] == [((0,),), ((0,),), ((1,),)]


def test_ranks_that_share_a_gpu_fit_it_together() -> None:
    plan = plan_of(Z_IMAGE | {"num_gpus": 0.25, "num_replicas": 4}, inventory="1xH100-80G")
    assert "1 rank, but of the 1 GPUs" in plan.refusals[0].message
    assert "ranks that share a GPU have to fit it together" in plan.refusals[0].message
    assert len(plan.groups[0].seats) == 3


def test_a_model_goes_where_it_fits() -> None:
    spec = OmniSpec.model_validate({"models": [FLUX]})
    plan = only(make_plan(spec, parse_inventory(["8xRTX4090-24G", "1xH100-80G"])))
    assert plan.seats[0].nodes[0].name == "node-1"
    assert plan.notes == ("Ray knows no GiB of GPUs, and may place it on node-0 too, where it does not fit",)


def test_limits_that_memory_does_not_allow_are_noted() -> None:
    tight = Z_IMAGE | {"memory": {"gpu_memory_utilization": 0.97}}
    note = only(plan_of(tight, inventory="1xRTX4090-24G")).notes[0]
    assert note.startswith("limits allow 2048x2048, which does not fit beside the weights; set limits.max_pixels to ")
    safe = {"limits": {"max_pixels": int(note.split()[-1])}}
    assert not only(plan_of(tight | safe, inventory="1xRTX4090-24G")).notes


def test_guidance_ranks_without_guidance_are_noted() -> None:
    assert only(plan_of(FLUX | {"parallel": {"cfg": 2}})).notes[0].startswith("cfg 2, but by default")
    assert not only(plan_of(QWEN_IMAGE | {"parallel": {"cfg": 2}})).notes


def test_a_cpu_group_on_nodes_with_gpus() -> None:
    spec = OmniSpec.model_validate({"models": [{"name": "x", "type": "ar", "source": "demo:chat", "device": "cpu"}]})
    plan = make_plan(spec, parse_inventory(["8xH100-80G"]))
    assert only(plan).placement.bundles == [{"CPU": 0.5}]
    assert "of a node's main memory: fits" in report(plan)
    assert "not estimated on a CPU" in report(plan)


def test_ranks_on_cpus_fit_the_main_memory_together() -> None:
    spec = OmniSpec.model_validate({"models": [{"name": "x", "type": "ar", "source": "demo:chat", "num_replicas": 9}]})
    plan = make_plan(spec, (Node("here", None, 0, host_gib=8.0),))
    assert "9 replicas x 1 rank of 2.0 GiB each, but the main memory has room for 3" in plan.refusals[0].message


def test_without_gpus_ranks_run_on_cpus() -> None:
    plan = make_plan(load(ROOT / "deployments/omni.yaml")[0], (unknown_node("here", 0),))
    assert not plan.refusals
    assert [group.placement.bundles for group in plan.groups] == [[{"CPU": 0.5}]] * 3


def test_on_cards_whose_memory_nobody_told_all_fits() -> None:
    half = {"num_gpus": 0.5, "memory": {"gpu_memory_utilization": 0.45}}
    models = [QWEN3 | half, FLUX | half, QWEN3 | {"name": "wide", "parallel": {"tensor": 2}}]
    plan = make_plan(OmniSpec.model_validate({"models": models}), (unknown_node("here", 3),))
    assert not plan.refusals
    assert [group.placement.num_gpus * group.placement.num_ranks for group in plan.groups] == [0.5, 0.5, 2]
    plan = make_plan(OmniSpec.model_validate({"models": models}), (unknown_node("here", 2),))
    assert "leave room for 0" in plan.refusals[0].message
    assert report(plan, find_fixes(plan))


def test_applications_share_the_nodes() -> None:
    nodes = parse_inventory(["1xH100-80G"])
    free = Free(nodes)
    spec = OmniSpec.model_validate({"models": [FLUX]})
    assert not make_plan(spec, nodes, free).refusals
    assert "leave room for 0" in make_plan(spec, nodes, free).refusals[0].message


def test_inventories() -> None:
    nodes = parse_inventory(["8xH100-80G x 2", "4xL40S", "1 x RTX4090-24G"])
    assert [(node.name, node.num_gpus, node.card.name) for node in nodes if node.card] == [
        ("node-0", 8, "H100-80G"),
        ("node-1", 8, "H100-80G"),
        ("node-2", 4, "L40S-48G"),
        ("node-3", 1, "RTX4090-24G"),
    ]
    assert local_inventory()[0].name == "this machine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8 H100", "it should be like '8xH100-80G x 2'"),
        ("0xH100-80G", "it should be like"),
        ("8xA100", "choose from A100-80G, A100-40G"),
        ("8xH100-80", None),
        ("8xRTX4080", "did you mean 'RTX4090-24G'|choose from"),
    ],
)
def test_inventories_that_are_none(text: str, message: str | None) -> None:
    if message is None:
        assert parse_inventory([text])
        return
    with pytest.raises(ConfigError, match=message):
        parse_inventory([text])


def test_serve_deploys_the_placement_of_the_plan() -> None:
    from omni_ray.app import _group_options

    plan = only(plan_of(FLUX | {"parallel": {"tensor": 2, "ulysses": 2}}))
    options = _group_options(plan.group, plan.placement)
    assert options["placement_group_bundles"] == plan.placement.bundles
    assert options["placement_group_strategy"] == plan.placement.strategy
