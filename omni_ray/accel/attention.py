"""The attention kernel of a pipeline's transformers."""

from __future__ import annotations

from diffusers import DiffusionPipeline

from omni_ray.accel.modules import transformers_of
from omni_ray.config.spec import Attention
from omni_ray.errors import ConfigError


def apply_attention(pipe: DiffusionPipeline, spec: Attention) -> None:
    """Give every transformer the backend of the spec; ConfigError says why the installed libraries lack it."""
    if spec.backend is None:
        return
    for name, transformer in transformers_of(pipe).items():
        try:
            transformer.set_attention_backend(spec.backend)
        except (ValueError, RuntimeError, ImportError) as error:
            raise ConfigError(f"attention.backend {spec.backend!r} cannot serve {name}: {error}") from error
