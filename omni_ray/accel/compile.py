"""Regional compilation: each kind of repeated block is compiled once, not the whole transformer.

Source: https://docs.pytorch.org/tutorials/recipes/regional_compilation.html, through diffusers. What the compiler makes
is kept on the node, where all replicas and every later start find it.
"""

from __future__ import annotations

import os
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import ModelHook

from omni_ray.accel import inductor
from omni_ray.accel.hooks import register
from omni_ray.accel.modules import repeated_blocks, transformers_of
from omni_ray.accel.rotary import rotate_in_real_numbers
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
    folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", FOLDER.expanduser()))
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder if folder.name == inductor.RULES else folder / inductor.RULES)
    rotate_in_real_numbers()
    inductor.teach()
    warnings = []
    for name, transformer in transformers_of(pipe).items():
        if blocks := repeated_blocks(transformer):
            transformer._repeated_blocks = sorted({type(block).__name__ for block in blocks})
            transformer.compile_repeated_blocks(fullgraph=True, dynamic=None if spec.dynamic else False)
            if spec.dynamic:
                for block in blocks:
                    register(block, "sizes", Sizes())
            continue
        reason = f"{name} ({type(transformer).__name__}) names no repeated blocks"
        if spec.mode == "regional":
            raise ConfigError(f"compile.mode 'regional': {reason}; set mode: none")
        warnings.append(f"compile auto: {reason}, so it is not compiled")
    return warnings


class Sizes(ModelHook):  # type: ignore[misc]
    """Tells the compiler which sizes of a block's inputs are another request's to choose: all but the channels.

    With every size a variable, channels and heads among them, tracing a block takes several times as long.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[Hashable] = set()

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = tuple(map(_in_order, args)), {name: _in_order(value) for name, value in kwargs.items()}
        values = (*args, *kwargs.values())
        key = (*map(type, values), next(value.shape[0] for value in values if isinstance(value, torch.Tensor)))
        if key not in self._seen:  # else the compiler knows
            self._seen.add(key)
            for value in values:
                _mark(value)
        return args, kwargs


def _in_order(value: Any) -> Any:
    """In a batch of one, the stride of the batch means nothing, and yet the compiler makes a graph for each."""
    if isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[0] == 1 and value.stride(0) != value.numel():
        return value.squeeze(0).unsqueeze(0)
    return value


def _mark(value: Any) -> None:
    if isinstance(value, tuple):
        for each in value:
            _mark(each)
    elif isinstance(value, torch.Tensor):
        has_channels = value.is_floating_point() or value.is_complex()
        torch._dynamo.maybe_mark_dynamic(value, tuple(range(value.ndim - has_channels)))
