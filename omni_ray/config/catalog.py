"""Which transformers can be spread over which axes, and how, as plain data that needs no torch to read.

Paths name modules inside a transformer: ``*`` is every module of a list, ``-1`` the last one, and a path that ends in
``?`` may lack in some blocks or checkpoints. Where a plan is `None`, diffusers has one on the class (``_cp_plan``,
``_tp_plan``), and that one is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from omni_ray.config.spec import DitParallel

Axis = Literal["tensor", "ulysses", "ring"]


@dataclass(frozen=True)
class Split:
    """A tensor of ``ndim`` dimensions whose dimension ``dim`` is the sequence; each rank takes its part of it."""

    dim: int
    ndim: int
    stream: str = ""
    """What the sequence is called in `SequencePlan.attention`; an argument's own name where this is empty."""
    tail: str = ""
    """An argument that says how many tokens at the end are the stream; those before them are ``history``."""
    optional: bool = False
    """Has a sequence in some checkpoints only; it is left alone when it has another number of dimensions."""


@dataclass(frozen=True)
class SequencePlan:
    """Where a forward is cut into sequence shards, where they are joined, and what each attention reads.

    ``attention`` names, per attention module, the streams that it joins, in that order. With them, the padding that
    makes a length a multiple of the ranks is known to the attention, which leaves it out.
    """

    attention: Mapping[str, tuple[str, ...]]
    processors: tuple[str, ...]
    """Classes of the attention processors that can run on shards."""
    inputs: Mapping[str, Mapping[str, Split]] | None = None
    outputs: Mapping[str, Mapping[int, Split]] = field(default_factory=dict)
    gather: Mapping[str, str] = field(default_factory=dict)
    """Modules whose output, (batch, tokens, channels), is joined again, and the stream that it is."""
    lengths: Mapping[str, str] = field(default_factory=dict)
    """Modules with an argument that counts tokens of ``hidden_states``: they get the count of the shard."""


Style = Literal["colwise", "rowwise"]


@dataclass(frozen=True)
class TensorPlan:
    """Which Linears each rank holds a part of: ``colwise`` a part of the outputs, ``rowwise`` of the inputs."""

    linears: Mapping[str, Style] | None = None
    gathered: tuple[str, ...] = ()
    """Linears whose outputs are computed in parts and put together again on each rank: modulations. They have up to a
    third of a family's weights, but an input of one token.
    """
    norms: tuple[str, ...] = ()
    """RMS norms over all heads together: their sum of squares is summed over the ranks."""
    divide_heads: tuple[str, ...] = ()
    """Attention modules whose processor takes the number of heads from ``heads``: each rank's own."""
    mlp: Callable[[Mapping[str, Any]], int] | None = None
    """From the config, the width of the MLP; None where it is a multiple of the heads, and so divides with them."""


@dataclass(frozen=True)
class Family:
    """A transformer class of diffusers."""

    transformer: str
    heads: str = "num_attention_heads"
    """The key of its config that holds the number of attention heads."""
    sequence: SequencePlan | None = None
    tensor: TensorPlan | None = None
    stacks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Its lists of blocks, in the order of the forward, and the arguments that each block hands on to the next."""
    teacache_coefficients: tuple[float, ...] = (1.0, 0.0)
    """The polynomial that TeaCache rescales its distance by, highest power first; as it is where none is known."""

    has_cache_dit: bool = True
    """Whether the cache-dit library has an adapter for it."""

    can_be_recorded: bool = True
    """Whether its forward neither reads from the device nor copies to it, which no CUDA graph can hold."""

    has_fused_qkv: bool = False
    """Whether diffusers can make its queries, keys and values by one matrix product."""

    @property
    def has_no_curve(self) -> bool:
        return self.teacache_coefficients == (1.0, 0.0)

    @property
    def axes(self) -> tuple[Axis, ...]:
        sequence: tuple[Axis, ...] = ("ulysses", "ring") if self.sequence else ()
        tensor: tuple[Axis, ...] = ("tensor",) if self.tensor else ()
        return tensor + sequence


TEXT_IMAGE = ("encoder_hidden_states", "hidden_states")
IMAGE_TEXT = ("hidden_states", "encoder_hidden_states")
SELF = ("hidden_states",)


def _attention(path: str, optional: str = "") -> dict[str, Style]:
    """The Linears of an attention; ``optional`` is ``?`` where some blocks lack it."""
    linears: dict[str, Style] = {f"{path}.{name}{optional}": "colwise" for name in ("to_q", "to_k", "to_v")}
    return linears | {f"{path}.to_out.0{optional}": "rowwise"}


def _mlp(path: str, optional: str = "") -> dict[str, Style]:
    """The Linears of diffusers' FeedForward."""
    return {f"{path}.net.0.proj{optional}": "colwise", f"{path}.net.2{optional}": "rowwise"}


def _z_image_block(layers: str) -> dict[str, Style]:
    feed_forward: dict[str, Style] = {f"{layers}.feed_forward.{name}": "colwise" for name in ("w1", "w3")}
    return _attention(f"{layers}.attention") | feed_forward | {f"{layers}.feed_forward.w2": "rowwise"}


FLUX = Family(
    "FluxTransformer2DModel",
    has_fused_qkv=True,
    sequence=SequencePlan(
        {"transformer_blocks.*.attn": TEXT_IMAGE, "single_transformer_blocks.*.attn": TEXT_IMAGE},
        processors=("FluxAttnProcessor",),
    ),
    tensor=TensorPlan(
        gathered=(
            "transformer_blocks.*.norm1.linear",
            "transformer_blocks.*.norm1_context.linear",
            "single_transformer_blocks.*.norm.linear",
        )
    ),
    stacks={"transformer_blocks": TEXT_IMAGE, "single_transformer_blocks": TEXT_IMAGE},
    # https://github.com/ali-vilab/TeaCache, for FLUX.1-dev.
    teacache_coefficients=(498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861),
)

FLUX2 = Family(
    "Flux2Transformer2DModel",
    has_fused_qkv=True,
    sequence=SequencePlan(
        {"transformer_blocks.*.attn": TEXT_IMAGE, "single_transformer_blocks.*.attn": TEXT_IMAGE},
        processors=("Flux2AttnProcessor", "Flux2ParallelSelfAttnProcessor"),
    ),
    tensor=TensorPlan(),
    stacks={"transformer_blocks": TEXT_IMAGE, "single_transformer_blocks": SELF},
)

QWEN_IMAGE = Family(
    "QwenImageTransformer2DModel",
    sequence=SequencePlan(
        {"transformer_blocks.*.attn": TEXT_IMAGE},
        processors=("QwenDoubleStreamAttnProcessor2_0",),
    ),
    tensor=TensorPlan(gathered=("transformer_blocks.*.img_mod.1", "transformer_blocks.*.txt_mod.1")),
    stacks={"transformer_blocks": TEXT_IMAGE},
)

HUNYUAN_IMAGE = Family(
    "HunyuanImageTransformer2DModel",
    stacks={"transformer_blocks": IMAGE_TEXT, "single_transformer_blocks": IMAGE_TEXT},
    can_be_recorded=False,
)

_Z_IMAGE_LAYERS = ("noise_refiner", "context_refiner", "layers")

Z_IMAGE = Family(
    "ZImageTransformer2DModel",
    heads="n_heads",
    sequence=SequencePlan(
        {f"{layers}.*.attention": ("x",) for layers in _Z_IMAGE_LAYERS},
        processors=("ZSingleStreamAttnProcessor",),
        inputs={
            **{
                f"{layers}.*": {"attn_mask": Split(1, 2), "freqs_cis": Split(1, 3), "noise_mask": Split(1, 2)}
                for layers in _Z_IMAGE_LAYERS
            },
            **{f"{layers}.0": {"x": Split(1, 3)} for layers in _Z_IMAGE_LAYERS},
            "all_final_layer.*": {"noise_mask": Split(1, 2)},
        },
        gather={"noise_refiner.-1": "x", "context_refiner.-1": "x", "all_final_layer.*": "x"},
    ),
    tensor=TensorPlan(
        linears={k: v for layers in _Z_IMAGE_LAYERS for k, v in _z_image_block(f"{layers}.*").items()},
        divide_heads=tuple(f"{layers}.*.attention" for layers in _Z_IMAGE_LAYERS),
        mlp=lambda config: int(config["dim"] / 3 * 8),
    ),
    stacks={"layers": ("x",)},
)

SD3 = Family(
    "SD3Transformer2DModel",
    sequence=SequencePlan(
        {
            "transformer_blocks.*.attn": IMAGE_TEXT,
            "transformer_blocks.*.attn2?": SELF,
        },
        processors=("JointAttnProcessor2_0",),
        inputs={},
        # At what feeds the first block, not at the block: skip-layer guidance may leave that out.
        outputs={
            "pos_embed": {0: Split(1, 3, stream="hidden_states")},
            "context_embedder": {0: Split(1, 3, stream="encoder_hidden_states")},
        },
        gather={"proj_out": "hidden_states"},
    ),
    tensor=TensorPlan(
        linears={
            **_attention("transformer_blocks.*.attn"),
            **{f"transformer_blocks.*.attn.add_{name}_proj": "colwise" for name in "qkv"},
            "transformer_blocks.*.attn.to_add_out?": "rowwise",
            **_attention("transformer_blocks.*.attn2", "?"),
            **_mlp("transformer_blocks.*.ff"),
            **_mlp("transformer_blocks.*.ff_context", "?"),
        },
        gathered=("transformer_blocks.*.norm1.linear", "transformer_blocks.*.norm1_context.linear"),
        divide_heads=("transformer_blocks.*.attn", "transformer_blocks.*.attn2?"),
    ),
    stacks={"transformer_blocks": TEXT_IMAGE},
    has_cache_dit=False,
)

WAN = Family(
    "WanTransformer3DModel",
    has_fused_qkv=True,
    sequence=SequencePlan(
        {"blocks.*.attn1": SELF},
        processors=("WanAttnProcessor",),
        # As in diffusers' plan, which leaves a timestep per request alone without saying so.
        inputs={"": {"timestep": Split(1, 2, optional=True)}, "blocks.0": {"hidden_states": Split(1, 3)}},
        outputs={"rope": {0: Split(1, 4), 1: Split(1, 4)}},
        gather={"proj_out": "hidden_states"},
    ),
    tensor=TensorPlan(
        linears={
            **_attention("blocks.*.attn1"),
            **_attention("blocks.*.attn2"),
            "blocks.*.attn2.add_k_proj?": "colwise",
            "blocks.*.attn2.add_v_proj?": "colwise",
            **_mlp("blocks.*.ffn"),
        },
        norms=(
            "blocks.*.attn1.norm_q",
            "blocks.*.attn1.norm_k",
            "blocks.*.attn2.norm_q",
            "blocks.*.attn2.norm_k",
            "blocks.*.attn2.norm_added_k?",
        ),
        divide_heads=("blocks.*.attn1", "blocks.*.attn2"),
        mlp=lambda config: int(config["ffn_dim"]),
    ),
    stacks={"blocks": SELF},
)

_HELIOS_TAIL = "original_context_length"

HELIOS = Family(
    "HeliosTransformer3DModel",
    has_fused_qkv=True,
    sequence=SequencePlan(
        {"blocks.*.attn1": ("history", "hidden_states")},
        processors=("HeliosAttnProcessor",),
        # diffusers' plan joins the shards three times in each of 40 blocks, because they cut the history off by its
        # length. Here history and latents are split apart, and each block gets the length of its shard.
        inputs={
            "blocks.*": {"temb": Split(1, 4, tail=_HELIOS_TAIL), "rotary_emb": Split(1, 3, tail=_HELIOS_TAIL)},
            "blocks.0": {"hidden_states": Split(1, 3, tail=_HELIOS_TAIL)},
            "norm_out": {"temb": Split(1, 3, tail=_HELIOS_TAIL)},
        },
        gather={"proj_out": "hidden_states"},
        lengths={"blocks.*": _HELIOS_TAIL, "norm_out": _HELIOS_TAIL},
    ),
    stacks={"blocks": SELF},
    can_be_recorded=False,
)

FAMILIES = {
    family.transformer: family for family in (FLUX, FLUX2, QWEN_IMAGE, HUNYUAN_IMAGE, Z_IMAGE, SD3, WAN, HELIOS)
}


def can_be_recorded(transformer: str) -> bool:
    """Whether CUDA graphs may be made of a transformer of this class; of an unknown one it has to be tried."""
    return transformer not in FAMILIES or FAMILIES[transformer].can_be_recorded


def refusals(transformer: str, config: Mapping[str, Any], parallel: DitParallel) -> list[str]:
    """Why a transformer of this class and config cannot be spread so; empty where it can.

    Each line says what came, what was needed and what to change.
    """
    wanted: dict[Axis, int] = {"tensor": parallel.tensor, "ulysses": parallel.ulysses, "ring": parallel.ring}
    wanted = {axis: degree for axis, degree in wanted.items() if degree > 1}
    family = FAMILIES.get(transformer)
    axes = family.axes if family else ()
    missing = [
        f"parallel: {axis} {degree} was asked for, but {transformer} has {_listed(axes)}; set {axis}: 1"
        for axis, degree in wanted.items()
        if axis not in axes
    ]
    if missing or family is None:
        return missing
    degrees = {"tensor": parallel.tensor, "ulysses": parallel.ulysses}
    problems = [_indivisible(transformer, degrees, int(config[family.heads]), "attention heads")]
    if family.tensor and family.tensor.mlp:
        width = family.tensor.mlp(config)
        problems.append(_indivisible(transformer, {"tensor": parallel.tensor}, width, "MLP channels"))
    return [problem for problem in problems if problem]


def _indivisible(transformer: str, degrees: Mapping[str, int], whole: int, noun: str) -> str | None:
    """What is wrong where the product of ``degrees`` does not divide ``whole``."""
    parts = math.prod(degrees.values())
    if whole % parts == 0:
        return None
    axes = [f"{axis} {degree}" for axis, degree in degrees.items() if degree > 1]
    return (
        f"parallel: {' x '.join(axes)} need{'s' if len(axes) == 1 else ''} the {whole} {noun} of {transformer} to be a "
        f"multiple of {parts}; the largest smaller product that divides them is "
        f"{max(n for n in range(1, parts) if whole % n == 0)}"
    )


def _listed(axes: tuple[Axis, ...]) -> str:
    return f"only {', '.join(axes)}" if axes else "no parallel axis"
