"""Decoding a picture on all ranks of a gang: each decodes some of its rows.

The decoder runs unchanged. Its convolutions get the neighbours' edge rows, its group norms take the statistics of the
whole picture, and its attention, which is in the small middle part, runs on the whole. So the picture is the one that a
single rank makes, unlike with tiles, whose seams are blended (DistVAE, https://github.com/xdit-project/DistVAE, has
the idea).
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline
from torch import nn

from omni_ray.accel.parallel.mesh import Ranks

logger = logging.getLogger(__name__)

AUTOENCODERS = ("AutoencoderKL", "AutoencoderKLFlux2", "AutoencoderKLQwenImage", "AutoencoderKLWan")
"""Classes whose decoders have nothing but what is dealt with here where rows matter."""

ATTENTIONS = ("Attention", "WanAttentionBlock", "QwenImageAttentionBlock")


def split_decode(pipe: DiffusionPipeline) -> None:
    """Spread the decoder of the pipeline's autoencoder over the default process group. All of its ranks call this."""
    vae: Any = getattr(pipe, "vae", None)
    if type(vae).__name__ not in AUTOENCODERS:
        logger.warning("every rank decodes the whole picture: %s cannot be split by rows", type(vae).__name__)
        return
    everyone: Any = dist.group.WORLD
    rows = Rows(Ranks(everyone, dist.get_world_size(), dist.get_rank()))
    _become(vae.decoder, SplitDecoder, rows)
    _adapt(vae.decoder, rows)


def _adapt(module: nn.Module, rows: Rows) -> None:
    for child in module.children():
        if type(child).__name__ in ATTENTIONS:
            _become(child, WholeAttention, rows)
            continue
        if isinstance(child, nn.GroupNorm):
            _become(child, SharedGroupNorm, rows)
        elif isinstance(child, (nn.Conv2d, nn.Conv3d)) and child.kernel_size[-2] > 1:
            _become(child, HaloConv, rows)
            _pad_no_rows(child)
        _adapt(child, rows)


def _become(module: nn.Module, mixin: type, rows: Rows) -> None:
    """Make ``module`` an instance of its own class with ``mixin`` before it."""
    cls = type(module)
    module.__class__ = type(f"{mixin.__name__}{cls.__name__}", (mixin, cls), {})
    module.rows = rows  # type: ignore[assignment]


def _pad_no_rows(conv: Any) -> None:
    """The rows above and below come from the neighbours, or are the zeros that the padding would be."""
    conv.num_halo_rows = (conv.kernel_size[-2] - 1) // 2
    if hasattr(conv, "_padding"):  # the causal convolutions of video autoencoders pad by themselves
        conv._padding = (*conv._padding[:2], 0, 0, *conv._padding[4:])
    else:
        conv.padding = (*conv.padding[:-2], 0, conv.padding[-1])


class Rows:
    """How the rows of the picture lie on the ranks. ``heights`` are those of the latents; empty while not split."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.heights: list[int] = []

    def split(self, height: int) -> None:
        """Spread ``height`` latent rows as evenly as they divide."""
        size = self.ranks.size
        self.heights = [(i + 1) * height // size - i * height // size for i in range(size)]

    def part(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's rows of a whole (..., rows, columns)."""
        scale, index = x.shape[-2] // sum(self.heights), self.ranks.index
        return x.narrow(-2, scale * sum(self.heights[:index]), scale * self.heights[index])

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """The whole of what the ranks hold of it."""
        scale, most = x.shape[-2] // self.heights[self.ranks.index], max(self.heights)
        padded = nn.functional.pad(x, (0, 0, 0, scale * most - x.shape[-2]))
        parts = self.ranks.gather(padded, -2).chunk(self.ranks.size, -2)
        return torch.cat([part.narrow(-2, 0, scale * h) for part, h in zip(parts, self.heights, strict=True)], -2)

    def with_halo(self, x: torch.Tensor, num: int) -> torch.Tensor:
        """This rank's rows with ``num`` rows of the neighbours above and below; zeros where the picture ends."""
        if not self.heights:
            return nn.functional.pad(x, (0, 0, num, num))
        zeros = torch.zeros_like(x[..., :num, :])
        edges = self.ranks.gather(torch.cat([x[..., :num, :], x[..., -num:, :]], -2), -2).split(num, -2)
        framed = [zeros, *edges, zeros]  # bottom of the rank above: 2 index, top of the one below: 2 index + 3
        index = self.ranks.index
        return torch.cat([framed[2 * index], x, framed[2 * index + 3]], -2)


class SplitDecoder:
    """A decoder that takes the whole latents, decodes its rows, and returns the whole picture."""

    rows: Rows

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        compute = super().forward  # type: ignore[misc]
        if x.shape[-2] < self.rows.ranks.size:
            return compute(x, *args, **kwargs)  # type: ignore[no-any-return]
        self.rows.split(x.shape[-2])
        try:
            return self.rows.whole(compute(self.rows.part(x), *args, **kwargs))
        finally:
            self.rows.heights = []


class HaloConv:
    """A convolution that sees the edge rows of its neighbours, in the frames before (``cache_x``) too."""

    rows: Rows
    num_halo_rows: int

    def forward(self, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        compute = super().forward  # type: ignore[misc]
        x = self.rows.with_halo(x, self.num_halo_rows)
        if cache_x is None:
            return compute(x)  # type: ignore[no-any-return]
        return compute(x, self.rows.with_halo(cache_x, self.num_halo_rows))  # type: ignore[no-any-return]


class SharedGroupNorm:
    """A GroupNorm whose mean and variance are those of all ranks' rows."""

    rows: Rows
    num_groups: int
    eps: float
    weight: torch.Tensor | None
    bias: torch.Tensor | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.rows.heights:
            return super().forward(x)  # type: ignore[misc, no-any-return]
        out: torch.Tensor
        ranks, wide = self.rows.ranks, x.float().unflatten(1, (self.num_groups, -1)).flatten(2)
        count = wide.shape[-1] * sum(self.rows.heights) / self.rows.heights[ranks.index]
        wide = wide - ranks.sum(wide.sum(-1, keepdim=True)) / count
        variance = ranks.sum(wide.square().sum(-1, keepdim=True)) / count
        out = (wide * torch.rsqrt(variance + self.eps)).view(x.shape)
        if self.weight is not None and self.bias is not None:
            shape = (1, -1, *[1] * (x.ndim - 2))
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(x.dtype)


class WholeAttention:
    """Attention over the whole picture, of which each rank keeps its rows."""

    rows: Rows

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        compute = super().forward  # type: ignore[misc]
        if not self.rows.heights:
            return compute(x, *args, **kwargs)  # type: ignore[no-any-return]
        return self.rows.part(compute(self.rows.whole(x), *args, **kwargs))
