"""The attention kernel of a pipeline's transformers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)

from omni_ray.accel import flash3
from omni_ray.accel.modules import transformers_of
from omni_ray.config.spec import Attention
from omni_ray.errors import ConfigError

BACKENDS = {"cudnn": "_native_cudnn", "fa3": "_flash_3"}
"""Short names of diffusers' backends; the others are diffusers' own: native, flash, sage, xformers, flex, …"""

FLASH_3 = ("_flash_3", flash3.FP8)

TRIAL_SHAPE = (1, 128, 2, 64)
"""[batch, tokens, heads, channels]."""

RACE_TOKENS = {"image": 4608, "video": 16384}
"""Those of FLUX.1-dev at 1024x1024, and about half of those of Wan2.2 for five seconds of 480p."""

FLUX_HEADS, FLUX_HEAD_SIZE = 24, 128

WORTH_IT = 0.9
"""A kernel that needs no more than this part of the time of PyTorch's own choice takes its place. Nearer to 1, noise
would decide, and replicas of a group would not draw the same to the bit."""


def apply_attention(pipe: DiffusionPipeline, spec: Attention, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Give every transformer the kernel of the spec, after a trial on ``device``. Returns warnings.

    Raises ConfigError where the installed libraries or the device cannot run a kernel that the spec names.
    """
    name, transformers = spec.backend, transformers_of(pipe)
    if name == "auto":
        if device.type != "cuda" or not transformers:
            return []
        name = _fastest(_race_shape(next(iter(transformers.values())).config), device, dtype)
        if name == "native":
            return []
    backend = BACKENDS.get(name, name)
    _make_known(backend, device)
    for path, transformer in transformers.items():
        if backend == flash3.FP8:
            flash3.check_normalized(transformer, path)
        _set(transformer, backend)
    _try(backend, device, dtype)
    return []


def _make_known(backend: str, device: torch.device) -> None:
    if backend not in FLASH_3:
        return
    flash3.check_card(device)
    try:
        flash3.register()
    except ConfigError as error:
        if backend == flash3.FP8 or not flash3.BUILT_FROM_SOURCE:
            raise ConfigError(f"attention.backend {backend!r} cannot be used: {error}") from error


def _set(transformer: torch.nn.Module, backend: str) -> None:
    """For this transformer alone: diffusers would make it the kernel of every other module of the process too."""
    others, _ = _AttentionBackendRegistry.get_active_backend()
    try:
        transformer.set_attention_backend(backend)  # type: ignore[operator]
    except (ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(f"attention.backend {backend!r} cannot be used: {error}") from error
    finally:
        _AttentionBackendRegistry.set_active_backend(others)


def _race_shape(config: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """[batch, tokens, heads, channels] of an attention of a transformer, at about its default size."""
    tokens = RACE_TOKENS["video" if len(_list(config.get("patch_size"))) == 3 else "image"]
    heads = config.get("num_attention_heads") or config.get("n_heads")
    if not isinstance(heads, int):  # a U-Net's differ from block to block
        heads = FLUX_HEADS
    size = config.get("attention_head_dim") or config.get("dim", FLUX_HEAD_SIZE * heads) // heads
    return 1, tokens, heads, size if isinstance(size, int) else FLUX_HEAD_SIZE


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [value]


def _fastest(shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype) -> str:
    """The fastest for ``shape`` of those kernels that are installed and run, and change nothing that can be seen."""
    seconds = {"native": _seconds("native", shape, device, dtype)}
    for name, backend in BACKENDS.items():
        with contextlib.suppress(ConfigError):
            _make_known(backend, device)
            _try(backend, device, dtype)
            seconds[name] = _seconds(backend, shape, device, dtype)
    best = min(seconds, key=seconds.__getitem__)
    return best if seconds[best] <= WORTH_IT * seconds["native"] else "native"


def _seconds(
    backend: str, shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype, repeats: int = 10
) -> float:
    x = torch.randn(shape, device=device, dtype=dtype)
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
