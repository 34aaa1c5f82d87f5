"""The modules of a pipeline by their part in it."""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers import DiffusionPipeline

from omni_ray.config.catalog import FAMILIES


def transformers_of(pipe: DiffusionPipeline) -> dict[str, Any]:
    """The denoisers by component name: one, or two where a model has experts for high and low noise (Wan2.2)."""
    return {
        name: module
        for name, module in pipe.components.items()
        if isinstance(module, torch.nn.Module) and is_transformer(name)
    }


def is_transformer(name: str) -> bool:
    """Whether the component of this name is a denoiser."""
    return name.split("_")[0] in ("transformer", "unet")


def is_quantized(module: torch.nn.Module) -> bool:
    """Whether it is so in its checkpoint, by diffusers or transformers."""
    return bool(getattr(module, "is_quantized", False) or getattr(module, "hf_quantizer", None))


def repeated_blocks(transformer: torch.nn.Module) -> list[torch.nn.Module]:
    """Those of the classes that it names, else of those in the stacks of its family."""
    family = FAMILIES.get(type(transformer).__name__)
    stacks = [cast("torch.nn.ModuleList", transformer.get_submodule(name)) for name in family.stacks] if family else []
    kinds = cast("list[str] | None", getattr(transformer, "_repeated_blocks", None))
    kinds = kinds or [type(block).__name__ for stack in stacks for block in stack]
    return [module for module in transformer.modules() if type(module).__name__ in kinds]
