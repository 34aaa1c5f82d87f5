"""Regional compilation: each kind of repeated block is compiled once, not the whole transformer.

Source: https://docs.pytorch.org/tutorials/recipes/regional_compilation.html, through diffusers. What the compiler makes
is kept on the node, where all replicas and every later start find it.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from omni_ray.accel.modules import transformers_of
from omni_ray.config.spec import Compile
from omni_ray.errors import ConfigError

FOLDER = Path("~/.cache/omni_ray/compiled")
"""Unless TORCHINDUCTOR_CACHE_DIR names another one."""


def is_compiled(spec: Compile, device: torch.device) -> bool:
    """Whether blocks are compiled: where the spec leaves it open, on GPUs."""
    return spec.mode == "regional" or (spec.mode == "auto" and device.type == "cuda")


def apply_compile(pipe: DiffusionPipeline, spec: Compile, device: torch.device) -> list[str]:
    """Mark the blocks for compilation; the compiler runs at their first forward. Returns warnings.

    Raises ConfigError where the spec asks for it and a transformer names no repeated blocks.
    """
    if not is_compiled(spec, device):
        return []
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(FOLDER.expanduser()))
    warnings = []
    for name, transformer in transformers_of(pipe).items():
        if getattr(transformer, "_repeated_blocks", None):
            transformer.compile_repeated_blocks(fullgraph=True, dynamic=spec.dynamic)
            continue
        reason = f"{name} ({type(transformer).__name__}) names no repeated blocks"
        if spec.mode == "regional":
            raise ConfigError(f"compile.mode 'regional': {reason}; set mode: none")
        warnings.append(f"compile auto: {reason}, so it is not compiled")
    return warnings
