"""One matrix product for queries, keys and values in place of three; in cross-attention, one for keys and values.

What is computed is diffusers' own; the weights of the three do not stay beside those of the one.
"""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline
from diffusers.models.attention import AttentionModuleMixin
from torch import nn

from omni_ray.accel.modules import transformers_of
from omni_ray.config.spec import Attention
from omni_ray.errors import ConfigError

SEPARATE = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
"""What each fused projection replaces."""


def fuse_projections(pipe: DiffusionPipeline, spec: Attention) -> None:
    """Fuse them in all transformers if the spec asks for it; ConfigError where a transformer has none to fuse."""
    for name, transformer in transformers_of(pipe).items() if spec.fused_qkv else ():
        modules: list[Any] = [each for each in transformer.modules() if _can_be_fused(each)]
        if not modules:
            raise ConfigError(
                f"attention.fused_qkv: {name} ({type(transformer).__name__}) has no projections that can be fused; "
                "remove the key"
            )
        for module in modules:
            module.fuse_projections()
            for separate in (each for fused, parts in SEPARATE.items() if hasattr(module, fused) for each in parts):
                delattr(module, separate)


def _can_be_fused(module: nn.Module) -> bool:
    return (
        isinstance(module, AttentionModuleMixin)
        and module._supports_qkv_fusion
        and all(type(getattr(module, name, None)) is nn.Linear for name in SEPARATE["to_kv"])
    )
