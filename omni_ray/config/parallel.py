"""The axes that a replica is spread over, and its nodes."""

from __future__ import annotations

import math
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from omni_ray.config.block import Block, Positive


class Parallel(Block):
    """What AR and DiT replicas have in common."""

    axes: ClassVar[tuple[str, ...]]

    num_nodes: Positive = Field(
        1, description="Nodes that the ranks of a replica are spread over, the same number on each."
    )

    @property
    def num_ranks(self) -> int:
        return math.prod(getattr(self, axis) for axis in self.axes)

    @property
    def ranks_per_node(self) -> int:
        return self.num_ranks // self.num_nodes

    @model_validator(mode="after")
    def _same_on_each_node(self) -> Self:
        ranks, nodes = self.num_ranks, self.num_nodes
        if ranks % nodes:
            product = " x ".join(f"{axis} {getattr(self, axis)}" for axis in self.axes)
            choices = ", ".join(str(each) for each in range(1, ranks + 1) if ranks % each == 0)
            raise ValueError(
                f"num_nodes = {nodes}: {product} = {ranks} ranks, and {ranks} / {nodes} is no whole number of ranks "
                f"for each node; choose from {choices}"
            )
        return self


class ArParallel(Parallel):
    """How vLLM spreads one replica over ranks. ``tensor`` x ``pipeline`` ranks make one replica."""

    axes: ClassVar[tuple[str, ...]] = ("tensor", "pipeline")

    tensor: Positive = Field(1, description="Tensor-parallel ranks.")
    pipeline: Positive = Field(1, description="Pipeline-parallel ranks.")


class DitParallel(Parallel):
    """How one replica is spread over ranks. The product of the axes is the number of ranks of a replica."""

    axes: ClassVar[tuple[str, ...]] = ("tensor", "ulysses", "ring", "cfg")

    tensor: Positive = Field(1, description="Tensor-parallel ranks: each holds a part of every layer's weights.")
    ulysses: Positive = Field(1, description="Sequence-parallel ranks that exchange attention heads (Ulysses).")
    ring: Positive = Field(1, description="Sequence-parallel ranks that gather each other's keys and values.")
    cfg: Literal[1, 2] = Field(1, description="2 computes the guidance branches of a step side by side.")
    vae: Literal["auto", "whole"] = Field(
        "auto",
        description="`auto` splits the rows of a decode over the ranks where the autoencoder can; `whole` never does.",
    )
