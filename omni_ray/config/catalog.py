"""Which transformers can be spread over which axes, and how, as plain data that needs no torch to read.

A name with one ``*`` means every block of a list, as in diffusers' own plans. Where a plan is `None`, diffusers has one
on the class (``_cp_plan``, ``_tp_plan``), and that one is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from omni_ray.config.spec import DitParallel

Axis = Literal["tensor", "ulysses", "ring"]


@dataclass(frozen=True)
class Split:
    """A tensor whose dimension ``dim`` is the sequence; each rank takes its part of it."""

    dim: int
    ndim: int


@dataclass(frozen=True)
class SequencePlan:
    """Where a forward is cut into sequence shards, where they are joined, and what each attention reads.

    ``attention`` names, per attention module, the split arguments that it joins, in that order. With them, the padding
    that makes a length a multiple of the ranks is known to the attention, which leaves it out.
    """

    attention: Mapping[str, tuple[str, ...]]
    inputs: Mapping[str, Mapping[str, Split]] | None = None
    outputs: Mapping[str, Mapping[int, Split]] = field(default_factory=dict)
    gather: Mapping[str, int] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()
    """Arguments that have a sequence in some checkpoints only: they are split when they have the split's rank."""


@dataclass(frozen=True)
class TensorPlan:
    """Which Linears each rank holds a part of: ``colwise`` a part of the outputs, ``rowwise`` of the inputs."""

    linears: Mapping[str, Literal["colwise", "rowwise"]] | None = None
    norms: tuple[str, ...] = ()
    """RMS norms over all heads together: the sum of squares is summed over the ranks."""
    divide_heads: tuple[str, ...] = ()
    """Attention modules whose processor takes the number of heads from ``heads``: each rank's own."""


@dataclass(frozen=True)
class Family:
    """A transformer class of diffusers."""

    transformer: str
    heads: str
    """The key of its config that holds the number of attention heads."""
    sequence: SequencePlan | None = None
    tensor: TensorPlan | None = None

    @property
    def axes(self) -> tuple[Axis, ...]:
        sequence: tuple[Axis, ...] = ("ulysses", "ring") if self.sequence else ()
        tensor: tuple[Axis, ...] = ("tensor",) if self.tensor else ()
        return tensor + sequence


_TEXT_THEN_IMAGE = ("encoder_hidden_states", "hidden_states")

FAMILIES: dict[str, Family] = {
    family.transformer: family
    for family in (
        Family(
            "FluxTransformer2DModel",
            heads="num_attention_heads",
            sequence=SequencePlan(
                {
                    "transformer_blocks.*.attn": _TEXT_THEN_IMAGE,
                    "single_transformer_blocks.*.attn": _TEXT_THEN_IMAGE,
                }
            ),
            tensor=TensorPlan(),
        ),
        Family(
            "QwenImageTransformer2DModel",
            heads="num_attention_heads",
            sequence=SequencePlan({"transformer_blocks.*.attn": _TEXT_THEN_IMAGE}),
            tensor=TensorPlan(),
        ),
    )
}


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
    heads = int(config[family.heads])
    parts = parallel.tensor * parallel.ulysses
    if heads % parts:
        return [
            f"parallel: tensor {parallel.tensor} x ulysses {parallel.ulysses} need the {heads} attention heads of "
            f"{transformer} to be a multiple of {parts}; the largest product that divides them is "
            f"{max(n for n in range(1, parts) if heads % n == 0)}"
        ]
    return []


def _listed(axes: tuple[Axis, ...]) -> str:
    return f"only {', '.join(axes)}" if axes else "no parallel axis"
