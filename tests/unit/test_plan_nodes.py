"""Replicas over several nodes: where their ranks go, what passes between nodes, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from omni_ray.config.spec import ArGroup, ArParallel, DitParallel, OmniSpec, Parallel
from omni_ray.errors import ConfigError
from omni_ray.plan.checkpoint import read_checkpoint
from omni_ray.plan.fixes import find_fixes
from omni_ray.plan.inventory import Node, parse_inventory
from omni_ray.plan.linear import Transformer
from omni_ray.plan.parts import parts_of
from omni_ray.plan.placement import rank_order
from omni_ray.plan.plan import Plan, make_plan
from omni_ray.plan.report import report
from omni_ray.plan.seconds import nodes_of_axes, sent_by_axis

WAN = {"name": "wan", "type": "dit", "source": "Wan-AI/Wan2.2-T2V-A14B-Diffusers"}
FLUX = {"name": "flux", "type": "dit", "source": "black-forest-labs/FLUX.1-dev"}
QWEN = {"name": "qwen", "type": "ar", "source": "Qwen/Qwen3-235B-A22B"}


def plan_of(*models: dict[str, Any], inventory: str) -> Plan:
    return make_plan(OmniSpec.model_validate({"models": models}), parse_inventory([inventory]))


def spread(model: dict[str, Any], num_nodes: int, **axes: int) -> dict[str, Any]:
    return model | {"parallel": {**axes, "num_nodes": num_nodes}}


def test_ranks_divide_by_nodes() -> None:
    with pytest.raises(ValidationError, match="ulysses 4 x ring 1 x cfg 2 = 8 ranks, and 8 / 3 is no whole number"):
        DitParallel(ulysses=4, cfg=2, num_nodes=3)
    with pytest.raises(ValidationError, match="choose from 1, 2, 4"):
        ArParallel(tensor=4, num_nodes=3)
    assert DitParallel(ulysses=4, cfg=2, num_nodes=2).ranks_per_node == 4


def test_vllm_spans_nodes_by_ray_alone() -> None:
    fields = {"name": "x", "type": "ar", "source": "demo:chat", "parallel": {"tensor": 2, "num_nodes": 2}}
    with pytest.raises(ValidationError, match="distributed_executor_backend = 'mp' stays inside a node"):
        ArGroup.model_validate(fields | {"engine_args": {"distributed-executor-backend": "mp"}})
    with pytest.raises(ValidationError, match=r"set parallel\.num_nodes of the model instead"):
        ArGroup.model_validate(fields | {"engine_args": {"nnodes": 2}})
    assert ArGroup.model_validate(fields | {"engine_args": {"distributed_executor_backend": "ray"}})


def test_rank_order_follows_nodes() -> None:
    nodes = {0: "b", 1: "a", 2: "b", 3: "a"}
    assert rank_order(nodes, DitParallel(ulysses=4, num_nodes=2), "m") == [1, 3, 0, 2]
    assert rank_order(dict.fromkeys(range(3), "a"), DitParallel(ring=3), "m") == [0, 1, 2]


@pytest.mark.parametrize(
    ("nodes", "change"),
    [
        ("aaaa", "placed 4 on a; set num_nodes to 1"),
        ("abcd", "placed 1 on a, 1 on b, 1 on c, 1 on d; set num_nodes to 4"),
        ("aaab", "placed 3 on a, 1 on b; make room for 2 ranks on each of 2 nodes"),
    ],
)
def test_ranks_that_ray_did_not_spread(nodes: str, change: str) -> None:
    with pytest.raises(ConfigError, match=f"needs 2 of the 4 ranks on each node, .* {change}"):
        rank_order(dict(enumerate(nodes)), DitParallel(ulysses=4, num_nodes=2), "m")


def test_a_replica_takes_as_many_gpus_of_each_node() -> None:
    plan = plan_of(spread(WAN, 2, ulysses=8, cfg=2), FLUX, inventory="8xH100-80G x 3")
    wan, flux = plan.groups
    assert not plan.refusals
    assert [node.name for node in wan.seats[0].nodes] == ["node-0", "node-1"]
    assert wan.seats[0].gpus == (tuple(range(8)),) * 2
    assert flux.seats[0].nodes[0].name == "node-2"
    assert wan.placement.bundles == [{"CPU": 0.5, "GPU": 1.0}] * 16
    assert wan.placement.strategy == "PACK"
    assert "16 ranks (ulysses 8 x cfg 2) on 2 nodes" in report(plan)
    assert "nodes     node-0 GPU 0-7 + node-1 GPU 0-7" in report(plan)


def test_serve_passes_the_strategy() -> None:
    from omni_ray.app import _group_options

    (group,) = plan_of(spread(WAN, 2, ulysses=8), inventory="4xH100-80G x 2").groups
    options = _group_options(group.group, group.placement)
    assert options["placement_group_strategy"] == "PACK"
    assert options["placement_group_bundles"] == [{"CPU": 0.5, "GPU": 1.0}] * 8


def test_the_nodes_of_a_replica_have_one_card() -> None:
    spec = OmniSpec.model_validate({"models": [spread(WAN, 2, ulysses=8)]})
    (group,) = make_plan(spec, parse_inventory(["4xH100-80G", "4xA100-80G x 2"])).groups
    assert [node.name for node in group.seats[0].nodes] == ["node-1", "node-2"]


def test_replicas_on_cpus_span_nodes() -> None:
    spec = OmniSpec.model_validate({"models": [spread(FLUX, 2, ulysses=2) | {"source": "demo:image"}]})
    plan = make_plan(spec, (Node("a", None, 0, 8.0), Node("b", None, 0, 8.0)))
    assert not plan.refusals
    assert plan.groups[0].seats[0].gpus == ((), ())


@pytest.mark.parametrize(
    ("parallel", "crossing"),
    [
        (DitParallel(ulysses=8, cfg=2, num_nodes=2), {"cfg": 2}),
        (DitParallel(tensor=2, ulysses=8, num_nodes=2), {"ulysses": 2}),
        (DitParallel(tensor=2, ulysses=2, ring=4, num_nodes=4), {"ring": 4}),
        (DitParallel(tensor=8, num_nodes=4), {"tensor": 4}),
        (DitParallel(tensor=3, ulysses=4, num_nodes=2), {"ulysses": 2}),
        (ArParallel(tensor=8, pipeline=2, num_nodes=2), {"pipeline": 2}),
        (DitParallel(ulysses=8), {}),
    ],
)
def test_axes_between_nodes(parallel: Parallel, crossing: dict[str, int]) -> None:
    assert nodes_of_axes(parallel) == crossing


def test_seconds_between_nodes() -> None:
    """Half of what each of eight Ulysses ranks sends, and of the rest of seven parts four go to the other node."""
    model = next(part.model for part in parts_of(read_checkpoint(str(WAN["source"]))) if part.role == "transformer")
    assert isinstance(model, Transformer)
    plan = plan_of(spread(WAN, 2, ulysses=8), inventory="4xH100-80G x 2")
    (group,) = plan.groups
    assert group.need
    assert group.need.estimate
    assert group.need.request
    sent = sent_by_axis(DitParallel(ulysses=8), model, group.need.request.image_tokens, 512)["ulysses"]
    assert dict(group.need.estimate.network)["ulysses"] == pytest.approx(100 * sent * 4 / 7 / (50e9 * 0.7))
    assert "s for ulysses, if it moves 50 GB/s per GPU" in report(plan)
    assert group.notes[0].startswith(
        "ulysses 8 does not stay inside a node, which has 4 of the ranks: every layer waits"
    )


def test_an_unknown_network_tells_no_seconds() -> None:
    plan = plan_of(spread(FLUX, 2, ulysses=8), inventory="4xL40S-48G x 2")
    assert "not estimated for this model on a L40S-48G, whose network the hardware table does not know" in report(plan)


@pytest.mark.parametrize(
    ("model", "inventory", "message", "fix"),
    [
        (
            WAN | {"parallel": {"ulysses": 8}},
            "4xH100-80G x 2",
            "ulysses 8 = 8 ranks, but the node 'node-0' has 4 GPUs and the others no more; lower one of them, or raise",
            "models[0] parallel.num_nodes: 2 (ranks talk through the network",
        ),
        (
            spread(WAN, 2, ulysses=4),
            "8xH100-80G x 2",
            "num_nodes 2, but 'node-0' alone has GPUs for all 4 ranks, and Ray packs them onto as few nodes",
            "models[0] parallel.num_nodes: 1 (as many GPUs on fewer nodes",
        ),
        (
            spread(WAN, 2, ulysses=8),
            "8xH100-80G",
            "num_nodes 2, but the inventory has 1 node; lower it, or add nodes",
            "models[0] parallel.num_nodes: 1 (as many GPUs on fewer nodes",
        ),
        (
            QWEN | {"parallel": {"tensor": 8}},
            "8xA100-40G x 2",
            "22.8 too much",
            "models[0] parallel.pipeline: 2, parallel.num_nodes: 2 (8 GPUs more a replica",
        ),
    ],
)
def test_refused_with_fixes_that_work(model: dict[str, Any], inventory: str, message: str, fix: str) -> None:
    plan = plan_of(model, inventory=inventory)
    assert message in report(plan)
    assert any(str(each).startswith(fix) for each in find_fixes(plan))


def test_llms_do_not_span_nodes_on_cpus() -> None:
    chat = spread(QWEN, 2, pipeline=2) | {"source": "demo:chat", "device": "cpu"}
    (refusal,) = plan_of(chat, inventory="8xH100-80G x 2").refusals
    assert refusal.is_final
    assert "vLLM spans nodes with GPUs alone" in refusal.message
