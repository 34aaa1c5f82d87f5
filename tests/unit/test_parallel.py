"""Tensor and sequence parallelism: the image of several ranks is the image of one, or the spec is refused."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

from omni_ray.accel.modules import transformers_of
from omni_ray.accel.parallel import apply_parallel, build_mesh
from omni_ray.accel.parallel.attention import ShardedAttention
from omni_ray.accel.parallel.mesh import Ranks
from omni_ray.accel.parallel.processor import sharded
from omni_ray.accel.parallel.sequence import Sequence
from omni_ray.config.catalog import FAMILIES, refusals
from omni_ray.config.spec import DitParallel
from omni_ray.errors import ConfigError
from tests.parallel_ranks import Case, pipeline, run_cases

TOLERANCE = 1e-4

CONFIGS: dict[str, dict[str, Any]] = {
    "flux": {"num_attention_heads": 4},
    "flux2": {"num_attention_heads": 4},
    "qwen_image": {"num_attention_heads": 4},
    "z_image": {"n_heads": 4, "n_kv_heads": 4, "dim": 64, "axes_lens": [512, 32, 32]},
    "sd3": {
        "num_attention_heads": 4,
        "caption_projection_dim": 64,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    },
    "wan": {"num_attention_heads": 4},
    "wan_i2v": {"num_attention_heads": 4},
    "helios": {},
}

# Neither 15 image tokens (25 of a video) nor these texts can be cut evenly.
LONG = "a very long tale of a red fox that swims over a blue lake at night"
CALLS: dict[str, list[dict[str, Any]]] = {
    "flux": [{"max_sequence_length": 13}, {"height": 64, "width": 64, "max_sequence_length": 16}],
    "flux2": [{"max_sequence_length": 33}],
    "qwen_image": [
        {"negative_prompt": "", "true_cfg_scale": 2.0},
        {"prompt": ["a fox", LONG]},
    ],
    "z_image": [{"prompt": ["a fox", LONG + LONG]}],
    "sd3": [{"max_sequence_length": 14, "guidance_scale": 2.0, "skip_guidance_layers": [0]}],
    "wan": [{"num_frames": 9}],
    "wan_i2v": [{"num_frames": 5}],
    "helios": [{"num_frames": 37, "history_sizes": [4, 2, 1], "num_latent_frames_per_chunk": 3}],
}

AXES: dict[int, list[dict[str, int]]] = {
    2: [{"ulysses": 2}, {"tensor": 2}, {"ring": 2}],
    4: [
        {"ulysses": 4},
        {"tensor": 4},
        {"ring": 4},
        {"tensor": 2, "ulysses": 2},
        {"ring": 2, "ulysses": 2},
    ],
}


def cases(num_ranks: int) -> list[Case]:
    found = []
    for family, calls in CALLS.items():
        for axes in AXES[num_ranks]:
            if family == "helios" and "tensor" in axes:
                continue
            config = CONFIGS[family]
            if family == "z_image" and axes.get("tensor") == 4:
                config = config | {"n_heads": 12, "n_kv_heads": 12, "dim": 192}  # its MLP is dim / 3 * 8 wide
            found += [Case(family, axes, call, config) for call in calls]
    if num_ranks == 2:
        compiled = [("flux", "tensor"), ("flux", "ulysses"), ("qwen_image", "ulysses"), ("wan", "tensor")]
        found += [Case(name, {axis: 2}, CALLS[name][0], CONFIGS[name], compile=True) for name, axis in compiled]
    else:
        mixed: list[dict[str, int]] = [{"cfg": 2, "ulysses": 2}, {"tensor": 2, "ring": 2}]
        found += [Case("qwen_image", axes, CALLS["qwen_image"][1], CONFIGS["qwen_image"]) for axes in mixed]
    return found


@cache
def results(num_ranks: int, folder: Path) -> dict[str, list[Any]]:
    return run_cases(cases(num_ranks), folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return cache(lambda num_ranks: tmp_path_factory.mktemp(f"ranks{num_ranks}"))


@pytest.mark.slow
@pytest.mark.parametrize("case", [*cases(2), *cases(4)], ids=lambda case: case.id)
def test_ranks_draw_what_one_rank_draws(case: Case, folder: Any) -> None:
    num_ranks = case.parallel.num_ranks
    ranks = results(num_ranks, folder(num_ranks))[case.id]
    assert all(isinstance(result, dict) for result in ranks), "\n".join(map(str, ranks))
    for result in ranks:
        assert result["scale"] > 0.5
        assert result["error"] <= TOLERANCE


def fake_sequence(ring: int, ulysses: int, index: int = 0) -> Sequence:
    """The sequence of one rank that cannot talk to the others."""
    group: Any = None
    return Sequence(Ranks(group, ring, index // ulysses), Ranks(group, ulysses, index % ulysses))


@pytest.mark.parametrize(("ring", "ulysses"), [(1, 2), (1, 3), (4, 1), (2, 4)])
@pytest.mark.parametrize("lengths", [(1, 5), (7, 16), (8, 8), (0, 9), (3, 1, 13)])
def test_valid_positions_are_those_of_the_tokens(ring: int, ulysses: int, lengths: tuple[int, ...]) -> None:
    streams = [torch.arange(length) + 100 * i + 1 for i, length in enumerate(lengths)]
    shards = []
    for index in range(ring * ulysses):
        sequence = fake_sequence(ring, ulysses, index)
        shards.append(torch.cat([sequence.shard(stream, 0) for stream in streams]))
    assert len({len(shard) for shard in shards}) == 1
    joined = torch.cat(shards)
    names = tuple(map(str, range(len(lengths))))
    sequence.lengths = dict(zip(names, lengths, strict=True))
    valid = sequence.valid(names, len(shards[0]), torch.device("cpu"))
    tokens = joined if valid is None else joined[valid]
    assert tokens.sort().values.tolist() == torch.cat(streams).sort().values.tolist()


def attend(length: int, mask: torch.Tensor | None = None, keys: int | None = None) -> None:
    sequence = fake_sequence(1, 2)
    sequence.lengths = {"x": 7}
    query = torch.zeros(2, length, 4, 8)
    key = torch.zeros(2, keys or length, 4, 8)
    ShardedAttention(sequence, ("x",))(query, key, key, mask, lambda *_: pytest.fail("the kernel ran"))


def test_an_attention_that_cannot_be_split_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"5 tokens per rank does not join x of \(7,\) tokens on 2 ranks"):
        attend(5)
    with pytest.raises(RuntimeError, match="6 keys for 4 queries"):
        attend(4, keys=6)
    with pytest.raises(RuntimeError, match=r"mask of shape \(2, 1, 4, 4\) cannot be split"):
        attend(4, mask=torch.ones(2, 1, 4, 4, dtype=torch.bool))
    with pytest.raises(RuntimeError, match=r"mask of shape \(2, 1, 1, 3\) cannot be split"):
        attend(4, mask=torch.ones(2, 1, 1, 3, dtype=torch.bool))


@pytest.mark.parametrize(
    ("family", "axes", "config", "message"),
    [
        (
            "flux",
            {"tensor": 2, "ulysses": 4},
            CONFIGS["flux"],
            "tensor 2 x ulysses 4 need the 4 .* 8; .* 4$",
        ),
        (
            "wan",
            {"ulysses": 3},
            CONFIGS["wan"],
            "ulysses 3 needs the 4 attention heads of WanTransformer3DModel .* 3; .* 2$",
        ),
        ("helios", {"tensor": 2}, {}, "tensor 2 .* HeliosTransformer3DModel has only ulysses, ring; set tensor: 1"),
        (
            "z_image",
            {"tensor": 4},
            CONFIGS["z_image"],
            "tensor 4 needs the 170 MLP channels of ZImageTransformer2DModel .* 4; .* 2$",
        ),
    ],
)
def test_refused_before_anything_is_changed(
    family: str, axes: dict[str, int], config: dict[str, Any], message: str
) -> None:
    pipe = pipeline(Case(family, axes, config=config))
    before = {name: copy.deepcopy(t.state_dict()) for name, t in transformers_of(pipe).items()}
    no_mesh: Any = None
    with pytest.raises(ConfigError, match=message):
        apply_parallel(pipe, DitParallel.model_validate(axes), no_mesh)
    for name, transformer in transformers_of(pipe).items():
        after = transformer.state_dict()
        assert all(torch.equal(before[name][key], after[key]) for key in before[name])
        assert not any(hasattr(module, "_diffusers_hook") for module in transformer.modules())


def test_an_attention_kernel_or_processor_without_shards_is_refused() -> None:
    no_mesh: Any = None
    pipe = pipeline(Case("flux", {"ulysses": 2}, config=CONFIGS["flux"]))
    pipe.transformer.transformer_blocks[1].attn.processor._attention_backend = "_native_math"
    with pytest.raises(ConfigError, match=r"attention\.backend '_native_math' cannot run on parts"):
        apply_parallel(pipe, DitParallel(ulysses=2), no_mesh)
    pipe.transformer.transformer_blocks[1].attn.processor = object()
    with pytest.raises(ConfigError, match="has the processor object, which cannot run"):
        apply_parallel(pipe, DitParallel(ring=2), no_mesh)


def test_a_kernel_without_shards_is_refused_later_too() -> None:
    attention: Any = object()
    processor = sharded(FluxAttnProcessor(), attention)
    assert processor._attention_backend == "native"
    processor._attention_backend = "_native_flash"
    with pytest.raises(ConfigError, match="'xformers' cannot run on parts"):
        processor._attention_backend = "xformers"
    assert processor._attention_backend == "_native_flash"


def test_a_mesh_of_other_ranks_is_refused(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ConfigError, match=r"cfg 2 x ring 1 x ulysses 2 x tensor 1 = 4 ranks, but .* has 1"):
            build_mesh(DitParallel(cfg=2, ulysses=2), "cpu")
    finally:
        dist.destroy_process_group()


def test_the_catalog_tells_what_a_class_lacks() -> None:
    assert refusals("FluxTransformer2DModel", {"num_attention_heads": 24}, DitParallel(tensor=2, ulysses=4)) == []
    assert refusals("UNet2DConditionModel", {}, DitParallel(cfg=2)) == []
    (line,) = refusals("UNet2DConditionModel", {}, DitParallel(ulysses=2))
    assert line == "parallel: ulysses 2 was asked for, but UNet2DConditionModel has no parallel axis; set ulysses: 1"
    assert {name for name, family in FAMILIES.items() if "tensor" not in family.axes} == {
        "HeliosTransformer3DModel",
        "HunyuanImageTransformer2DModel",
    }
