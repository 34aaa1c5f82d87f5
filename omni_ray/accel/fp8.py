"""Linears in fp8 (e4m3), with a scale for each output channel of the weights and for each token of the activations.

The kernel is PyTorch's own, and the weights are plain tensors, which the compiler's caches can keep.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

E4M3_MAX = 448.0
SMALLEST_SCALE = 1e-12
"""In place of the zero of a row of zeros."""


class Fp8Linear(nn.Linear):
    """A Linear whose weights :func:`convert` has made fp8."""

    def forward(self, x: Tensor) -> Tensor:
        return product(self, x, self.bias)


def convert(linear: nn.Linear) -> None:
    """Make the weights [out, in] fp8, and keep the scales beside them. The forward has to use :func:`product`."""
    weight, scale = to_fp8(linear.weight.detach())
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.scale = nn.Parameter(scale.t().contiguous(), requires_grad=False)
    if type(linear) is nn.Linear:
        linear.__class__ = Fp8Linear


def product(linear: nn.Linear, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x`` [..., in] times the weights, whatever their format, plus ``bias``, in the dtype of ``x``."""
    if linear.weight.dtype != torch.float8_e4m3fn:
        return nn.functional.linear(x, linear.weight, bias)
    rows, scale = to_fp8(x.reshape(-1, x.shape[-1]))
    weight, weight_scale = linear.weight.t(), cast(Tensor, linear.scale)
    out = torch._scaled_mm(rows, weight, scale, weight_scale, bias=bias, out_dtype=x.dtype, use_fast_accum=True)
    return out.view(*x.shape[:-1], -1)


def to_fp8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """``rows`` [n, k] in fp8, and the scale [n, 1] that each is to be multiplied by."""
    return _scaled(rows.float(), -1)


def to_fp8_heads(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` [batch, tokens, heads, size] in fp8, and the scale [batch, heads] that each is to be multiplied by."""
    made, scale = _scaled(x.float(), (1, 3))
    return made, scale.flatten(1)


def saturated(x: Tensor) -> Tensor:
    """``x`` in fp8; what is out of its range becomes the largest value, and not NaN."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _scaled(x: Tensor, dims: int | tuple[int, ...]) -> tuple[Tensor, Tensor]:
    scale = (x.abs().amax(dims, keepdim=True) / E4M3_MAX).clamp(min=SMALLEST_SCALE)
    return (x * scale.reciprocal()).to(torch.float8_e4m3fn), scale
