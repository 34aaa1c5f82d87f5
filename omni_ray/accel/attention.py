"""The attention kernel of a pipeline's transformers."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

from omni_ray.accel.modules import transformers_of
from omni_ray.config.spec import Attention
from omni_ray.errors import ConfigError

BACKENDS = {"cudnn": "_native_cudnn", "fa3": "_flash_3"}
"""Short names of diffusers' backends; the others are diffusers' own: native, flash, sage, xformers, flex, …"""

HOPPER = (9, 0)
"""Compute capability from which cuDNN's kernel is about twice as fast as PyTorch's choice: on an H200, for 4608 tokens
of 24 heads, 0.40 against 0.79 ms."""

TRIAL_SHAPE = (1, 128, 2, 64)
"""[batch, tokens, heads, channels]."""


def apply_attention(pipe: DiffusionPipeline, spec: Attention, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Give every transformer the kernel of the spec, after a trial on ``device``. Returns warnings.

    Raises ConfigError where the installed libraries or the device cannot run a kernel that the spec names.
    """
    name = spec.backend
    if name == "auto":
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < HOPPER:
            return []
        try:
            _try(BACKENDS["cudnn"], device, dtype)
        except ConfigError as error:
            return [f"attention auto: {error.message}; the models keep their own"]
        name = "cudnn"
    backend = BACKENDS.get(name, name)
    for transformer in transformers_of(pipe).values():
        _set(transformer, backend)
    _try(backend, device, dtype)
    return []


def _set(transformer: torch.nn.Module, backend: str) -> None:
    try:
        transformer.set_attention_backend(backend)  # type: ignore[operator]
    except (ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(f"attention.backend {backend!r} cannot be used: {error}") from error


def _try(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """One small attention: a library may be installed and yet not run, being built for another torch or card."""
    x = torch.randn(TRIAL_SHAPE, device=device, dtype=dtype)
    try:
        dispatch_attention_fn(x, x, x, backend=AttentionBackendName(backend))
    except Exception as error:
        message = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"attention.backend {backend!r} does not run on {device.type} in {dtype}: {message}"
        ) from error
