"""The modules of a pipeline by their part in it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline


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
