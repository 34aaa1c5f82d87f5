"""The autoencoder's own ways to need less memory, which are diffusers'."""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline

from omni_ray.config.spec import Vae
from omni_ray.errors import ConfigError


def apply_vae(pipe: DiffusionPipeline, spec: Vae) -> None:
    """Switch on what the spec asks for. Raises ConfigError where the pipeline's autoencoder has no such way."""
    vae: Any = getattr(pipe, "vae", None)
    for name in (name for name in type(spec).model_fields if getattr(spec, name)):
        if not hasattr(vae, f"use_{name}"):
            what = "there is none" if vae is None else f"{type(vae).__name__} cannot do that"
            raise ConfigError(f"vae.{name}: {what} in this pipeline; remove the key")
        getattr(vae, f"enable_{name}")()
