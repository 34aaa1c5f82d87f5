"""Regional compilation: each kind of repeated block is compiled once, not the whole transformer.

Source: https://docs.pytorch.org/tutorials/recipes/regional_compilation.html, through diffusers.
"""

from __future__ import annotations

from diffusers import DiffusionPipeline

from omni_ray.accel.modules import transformers_of
from omni_ray.config.spec import Compile
from omni_ray.errors import ConfigError


def apply_compile(pipe: DiffusionPipeline, spec: Compile) -> None:
    """Mark the blocks for compilation; the compiler runs at their first forward."""
    if spec.mode == "none":
        return
    for name, transformer in transformers_of(pipe).items():
        if not getattr(transformer, "_repeated_blocks", None):
            raise ConfigError(
                f"compile.mode 'regional': {name} ({type(transformer).__name__}) names no "
                "repeated blocks; set mode: none"
            )
        transformer.compile_repeated_blocks(fullgraph=True, dynamic=spec.dynamic)
