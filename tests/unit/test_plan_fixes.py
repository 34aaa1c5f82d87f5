"""What cannot work is refused with its arithmetic, and every fix that is offered works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from omni_ray.cli import main
from omni_ray.config.load import load
from omni_ray.config.spec import OmniSpec
from omni_ray.plan.fixes import apply, find_fixes
from omni_ray.plan.inventory import parse_inventory, unknown_node
from omni_ray.plan.plan import make_plan

FLUX = {"name": "flux", "type": "dit", "source": "black-forest-labs/FLUX.1-dev"}
FLUX2 = {"name": "flux2", "type": "dit", "source": "black-forest-labs/FLUX.2-dev"}
QWEN_32B = {"name": "qwen", "type": "ar", "source": "Qwen/Qwen3-32B"}

HEADS = FLUX | {"parallel": {"ulysses": 5}}
RANKS = FLUX | {"parallel": {"tensor": 2, "ulysses": 4}}
MEMORY = FLUX2 | {"parallel": {"ulysses": 4}}


def write(tmp_path: Path, *models: dict[str, Any]) -> str:
    application = {"name": "omni", "import_path": "omni_ray.app:build", "args": {"models": list(models)}}
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump({"applications": [application]}))
    return str(path)


def run(*arguments: str) -> Any:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return end.value.code


def rewrite(path: str, changes: Any) -> None:
    """The file with the changes of a fix, as a person would write them."""
    data = yaml.safe_load(Path(path).read_text())
    args = data["applications"][0]["args"]
    args["models"] = apply(OmniSpec.model_validate(args), changes).model_dump(exclude_unset=True, mode="json")["models"]
    Path(path).write_text(yaml.safe_dump(data))


@pytest.mark.parametrize(
    ("models", "inventory", "message"),
    [
        ([HEADS], "8xH100-80G", "24 attention heads of FluxTransformer2DModel to be a multiple of 5"),
        ([RANKS], "4xH100-80G", "tensor 2 x ulysses 4 = 8 ranks, but the node 'node-0' has 4 GPUs; lower one of them"),
        ([MEMORY], "8xH100-80G", "GiB a rank, but gpu_memory_utilization 0.9 of a H100-80G's 79.2 GiB is 71.3"),
        ([QWEN_32B], "1xH100-80G", "weights 61.0 + KV cache 10.0"),
        ([QWEN_32B | {"parallel": {"tensor": 3}}], "8xH100-80G", "tensor 3 does not divide the 64 attention heads"),
        ([FLUX | {"num_replicas": 3}], "2xH100-80G", "3 replicas x 1 rank, but of the 2 GPUs"),
        ([MEMORY, QWEN_32B], "8xH100-80G", "models[1].memory: weights 61.0"),
        (
            [QWEN_32B | {"name": "a"}, QWEN_32B | {"name": "b"}],
            "1xH200-141G",
            "models[1].num_replicas: 1 replica x 1 rank",
        ),
    ],
)
def test_refused_with_fixes_that_work(
    models: list[dict[str, Any]], inventory: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, *models)
    assert run("plan", path, "--inventory", inventory) == 1
    printed = capsys.readouterr().out
    assert message in printed
    plan = make_plan(load(path)[0], parse_inventory([inventory]))
    for fix in find_fixes(plan):
        assert f"  fix: {fix}" in printed
        if fix.card:
            assert run("plan", path, "--inventory", inventory.replace("H100-80G", fix.card.name)) == 0
            continue
        rewrite(write(tmp_path, *models), fix.changes)
        assert run("plan", path, "--inventory", inventory) == 0, str(fix)
        assert run("check", path) == 0


def test_another_model_may_make_room() -> None:
    spec = OmniSpec.model_validate({"models": [FLUX | {"num_replicas": 4}, FLUX | {"name": "b", "num_replicas": 4}]})
    plan = make_plan(spec, parse_inventory(["6xH100-80G"]))
    assert [str(fix).split(" (")[0] for fix in find_fixes(plan)] == [
        "models[1] num_replicas: 2",
        "models[0] num_replicas: 2",
    ]


def test_fixes_are_ranked_by_cost() -> None:
    spec = OmniSpec.model_validate({"models": [QWEN_32B]})
    fixes = find_fixes(make_plan(spec, parse_inventory(["2xH100-80G"])))
    assert [str(fix).split(" (")[0] for fix in fixes] == [
        "models[0] memory.gpu_memory_utilization: 0.95",
        "models[0] engine_args.max_model_len: 32768",
        "models[0] quantization: fp8",
        "models[0] parallel.tensor: 2",
        "cards of 95 GiB or more, such as RTXPRO6000-96G",
    ]


def test_check_refuses_what_no_node_can_serve(tmp_path: Path) -> None:
    path = write(tmp_path, HEADS)
    said = run("check", path)
    assert "applications[0].args.models[0].parallel: " in said
    assert "24 attention heads of FluxTransformer2DModel to be a multiple of 5" in said
    assert said.startswith(f"{path}:")
    assert run("check", write(tmp_path, RANKS)) == 0  # a node of eight GPUs can


def test_check_says_nothing_of_models_that_are_not_here(tmp_path: Path) -> None:
    assert run("check", write(tmp_path, FLUX | {"source": "acme/unheard-of", "parallel": {"ulysses": 5}})) == 0


def test_plan_of_a_model_that_is_not_here(tmp_path: Path) -> None:
    said = run("plan", write(tmp_path, FLUX | {"source": "acme/unheard-of"}), "--inventory", "1xH100-80G")
    assert said.startswith("models[0].source: source 'acme/unheard-of' is no folder here")


def test_an_llm_is_no_pipeline(tmp_path: Path) -> None:
    said = run("check", write(tmp_path, FLUX | {"source": "demo:chat"}))
    assert "models[0].source: it is Qwen3ForCausalLM; set type: ar" in said
    said = run("check", write(tmp_path, QWEN_32B | {"source": "demo:image"}))
    assert "it is FluxPipeline, a diffusers pipeline; set type: dit" in said


def test_cuda_without_gpus() -> None:
    spec = OmniSpec.model_validate({"models": [FLUX | {"source": "demo:image", "device": "cuda"}]})
    plan = make_plan(spec, (unknown_node("here", 0),))
    assert [str(refusal) for refusal in plan.refusals] == [
        "models[0].device: cuda, but no node has a GPU; set device: auto, or add a GPU node"
    ]
    assert str(find_fixes(plan)[0]).startswith("models[0] device: auto")
