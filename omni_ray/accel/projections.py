"""One matrix product for queries, keys and values in place of three; in cross-attention, one for keys and values.

What is computed is diffusers' own; the weights of the three do not stay beside those of the one.
"""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline
from diffusers.models.attention import AttentionModuleMixin
from torch import nn

from omni_ray.accel.modules import is_quantized, transformers_of
from omni_ray.config.catalog import FAMILIES
from omni_ray.config.spec import Attention
from omni_ray.errors import ConfigError

SEPARATE = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_added_kv": ("add_k_proj", "add_v_proj"),
}
"""What each fused projection replaces."""

ASKED_FOR = "to_added_kv"
"""Where a model looks whether those that it replaces are there."""


def fuse_projections(pipe: DiffusionPipeline, spec: Attention) -> None:
    """Fuse them in all transformers if the spec asks for it; ConfigError where a transformer has none to fuse."""
    for name, transformer in transformers_of(pipe).items() if spec.fused_qkv else ():
        kind = type(transformer).__name__
        if is_quantized(transformer):
            raise ConfigError(f"attention.fused_qkv: {name} is quantized in its checkpoint; remove the key")
        family = FAMILIES.get(kind)
        if family is None or not family.has_fused_qkv:
            raise ConfigError(f"attention.fused_qkv: {name} ({kind}) has no projections to fuse; remove the key")
        for module in _fusible(transformer):
            module.fuse_projections()
            for fused in SEPARATE.keys() & dict(module.named_children()).keys():
                for separate in SEPARATE[fused]:
                    if fused == ASKED_FOR:
                        setattr(module, separate, nn.Identity())
                    else:
                        delattr(module, separate)


def _fusible(transformer: nn.Module) -> list[Any]:
    modules = [each for each in transformer.modules() if isinstance(each, AttentionModuleMixin)]
    return [each for each in modules if each._supports_qkv_fusion]
