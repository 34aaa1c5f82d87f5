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


def apply_compile(
    pipe: DiffusionPipeline, spec: Compile, device: torch.device, *, sums_over_gloo: bool = False
) -> list[str]:
    """Mark the blocks for compilation; the compiler runs at their first forward. Returns warnings.

    ``sums_over_gloo``: the blocks hold sums over ranks that share a GPU, which crash in compiled code (torch 2.11).

    Raises ConfigError where the spec asks for it and it cannot be, or a transformer names no repeated blocks.
    """
    if not is_compiled(spec, device):
        return []
    if sums_over_gloo:
        reason = "tensor-parallel ranks that share a GPU cannot run compiled blocks"
        if spec.mode == "regional":
            raise ConfigError(f"compile.mode 'regional': {reason}; give each rank a GPU, or set mode: none")
        return [f"compile auto: {reason}, so nothing is compiled"]
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
