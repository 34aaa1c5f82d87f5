"""Qwen-Image's rotary embedding, made fit for the compiler and for recordings."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import torch
from diffusers.models.transformers import transformer_qwenimage

_complex: Callable[..., torch.Tensor] = transformer_qwenimage.apply_rotary_emb_qwen


def rotate_in_real_numbers() -> None:
    """From now on all Qwen-Image transformers of this process do so. diffusers multiplies complex numbers, for which
    the compiler makes no code."""
    transformer_qwenimage.apply_rotary_emb_qwen = _rotate


def keep_no_angles() -> None:
    """From now on the angles of each size are computed anew: diffusers keeps those of the last 128 sizes, and a
    recording would go on to read those that it no longer keeps."""
    rope = transformer_qwenimage.QwenEmbedRope
    rope._compute_video_freqs = inspect.unwrap(rope._compute_video_freqs)


@functools.wraps(_complex)
def _rotate(
    x: torch.Tensor, freqs_cis: torch.Tensor, use_real: bool = True, use_real_unbind_dim: int = -1
) -> torch.Tensor:
    """``x``: [B, S, heads, D]; ``freqs_cis``: [S, D/2], complex."""
    if use_real:
        return _complex(x, freqs_cis, use_real, use_real_unbind_dim)
    cos, sin = torch.view_as_real(freqs_cis).unsqueeze(1).unbind(-1)  # [S, 1, D/2]
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), -1)
    return rotated.flatten(3).type_as(x)
