"""FlashAttention 3, for Hopper cards (https://arxiv.org/abs/2407.08608), by the kernels of the wheel ``fa3-fwd``.

They come into diffusers' list of attention kernels: as ``_flash_3``, in place of the one that diffusers has for a build
from source, and, in fp8, as ``fa3_fp8``. Both run on parts of a sequence too. They know no masks: a call with one, such
as that of a prompt with padding, is PyTorch's.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor

from omni_ray.accel import fp8
from omni_ray.accel.parallel.attention import KERNELS
from omni_ray.errors import ConfigError

FP8 = "fa3_fp8"

BUILT_FROM_SOURCE = attention_dispatch._CAN_USE_FLASH_ATTN_3
"""Whether diffusers finds FlashAttention 3 by itself."""

HOPPER = 9
"""The first number of its compute capability."""

Kernel = Callable[[Tensor, Tensor, Tensor, float | None, bool], Tensor]
"""Queries, keys and values (batch, tokens, heads, head size), the scale of the scores, and whether it is causal."""


def register() -> None:
    """Make both kernels known to diffusers. ConfigError where ``fa3-fwd`` is not installed or cannot be loaded."""
    try:
        importlib.import_module("fa3_fwd_interface")
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"it needs the wheel fa3-fwd, which cannot be loaded ({error}): pip install fa3-fwd"
        ) from error
    _register("_flash_3", _attention)
    _register(FP8, _attention_in_fp8)
    attention_dispatch._CAN_USE_FLASH_ATTN_3 = True


def check_card(device: torch.device) -> None:
    """ConfigError if it is a GPU and no Hopper card: there the kernels would not fail, but end the process."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] != HOPPER:
        card = torch.cuda.get_device_name(device)
        raise ConfigError(f"attention.backend: FlashAttention 3 needs a Hopper card, and {card} is none; use auto")


def check_normalized(transformer: torch.nn.Module, name: str) -> None:
    """ConfigError if it has queries and keys that no norm bounds: :func:`_attention_in_fp8` takes them as they are."""
    attentions = {path: module for path, module in transformer.named_modules() if hasattr(module, "to_q")}
    without = [path for path, module in attentions.items() if getattr(module, "norm_q", None) is None]
    if without or not attentions:
        where = ".".join((name, *without[:1]))
        raise ConfigError(
            f"attention.backend {FP8!r}: {where} does not normalize its queries and keys, which may not fit into fp8; "
            f"use fa3"
        )


def _attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, causal: bool, **scales: Tensor
) -> Tensor:
    forward = torch.ops.fa3_fwd._flash_attn_forward
    return forward(query, key, value, softmax_scale=scale, causal=causal, **scales)[0]  # type: ignore[no-any-return]


def _attention_in_fp8(query: Tensor, key: Tensor, value: Tensor, scale: float | None, causal: bool) -> Tensor:
    """Values are scaled by the largest of each head. Queries and keys come from a norm, so no scale is looked for."""
    value, value_scale = fp8.to_fp8_heads(value)
    one = torch.ones_like(value_scale)
    scales = {"q_descale": one, "k_descale": one, "v_descale": value_scale}
    out = _attention(fp8.saturated(query), fp8.saturated(key), value, scale, causal, **scales)
    return out.to(query.dtype)  # the kernel's own is bfloat16


def _register(name: str, kernel: Kernel) -> None:
    """Add ``kernel`` to diffusers' list under ``name``."""

    def on_shards(
        _: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, dropout: float, causal: bool,
        scale: float | None, *rest: Any, **options: Any,
    ) -> Tensor:  # fmt: skip
        return kernel(query, key, value, scale, causal)

    def run(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,  # which the kernels do by themselves
        _parallel_config: Any = None,
    ) -> Tensor:
        if attn_mask is not None:
            native = _AttentionBackendRegistry._backends[AttentionBackendName.NATIVE]
            return native(  # type: ignore[no-any-return]
                query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa,
                _parallel_config=_parallel_config,
            )  # fmt: skip
        if _parallel_config is None:
            return kernel(query, key, value, scale, is_causal)
        sharded = attention_dispatch._templated_context_parallel_attention
        return sharded(  # type: ignore[no-any-return]
            query, key, value, None, 0.0, is_causal, scale,
            forward_op=on_shards, backward_op=None, _parallel_config=_parallel_config,
        )  # fmt: skip

    on_shards.__name__ = name
    KERNELS[name] = on_shards
    _AttentionBackendRegistry.register(_member(name), supports_context_parallel=True)(run)


def _member(name: str) -> AttentionBackendName:
    """That of diffusers' names, which is made one of them if it is none: they are an enumeration."""
    if name not in AttentionBackendName._value2member_map_:
        member = str.__new__(AttentionBackendName, name)
        member._name_, member._value_ = name.upper(), name
        AttentionBackendName._member_names_.append(member._name_)
        AttentionBackendName._member_map_[member._name_] = member
        AttentionBackendName._value2member_map_[name] = member
    return AttentionBackendName(name)
