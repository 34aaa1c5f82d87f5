"""The attention kernel of a pipeline's transformers."""

from __future__ import annotations

import contextlib
import time

import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

from omni_ray.accel.modules import transformers_of
from omni_ray.config.spec import Attention
from omni_ray.errors import ConfigError

BACKENDS = {"cudnn": "_native_cudnn", "fa3": "_flash_3"}
"""Short names of diffusers' backends; the others are diffusers' own: native, flash, sage, xformers, flex, …"""

TRIAL_SHAPE = (1, 128, 2, 64)
"""[batch, tokens, heads, channels]."""

RACE_SHAPE = (1, 4608, 24, 128)
"""That of FLUX.1-dev at 1024x1024. On an H100 PyTorch's own choice takes 0.42 ms there, its flash kernel 0.83."""

WORTH_IT = 0.95
"""A kernel that needs no more than this part of the time of PyTorch's own choice takes its place."""


def apply_attention(pipe: DiffusionPipeline, spec: Attention, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Give every transformer the kernel of the spec, after a trial on ``device``. Returns warnings.

    Raises ConfigError where the installed libraries or the device cannot run a kernel that the spec names.
    """
    name = spec.backend
    if name == "auto":
        name = _fastest(device, dtype) if device.type == "cuda" else "native"
        if name == "native":
            return []
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


def _fastest(device: torch.device, dtype: torch.dtype) -> str:
    """The fastest of those kernels that are installed and run."""
    seconds = {"native": _seconds("native", device, dtype)}
    for name, backend in BACKENDS.items():
        with contextlib.suppress(ConfigError):
            _try(backend, device, dtype)
            seconds[name] = _seconds(backend, device, dtype)
    best = min(seconds, key=seconds.__getitem__)
    return best if seconds[best] <= WORTH_IT * seconds["native"] else "native"


def _seconds(backend: str, device: torch.device, dtype: torch.dtype, repeats: int = 10) -> float:
    x = torch.randn(RACE_SHAPE, device=device, dtype=dtype)
    for i in range(2 * repeats):
        if i == repeats:  # after as many to warm up
            torch.cuda.synchronize(device)
            start = time.perf_counter()
        dispatch_attention_fn(x, x, x, backend=AttentionBackendName(backend))
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


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
