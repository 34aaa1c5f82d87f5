"""Quantization on load: fewer bits for the weights of the Linears in a component's blocks.

What lies before and after the blocks (embeddings, the last projection) is small and decides the quality, so it stays as
it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from typing import Any

import torch
from diffusers import DiffusionPipeline

from omni_ray.accel import fp8
from omni_ray.accel.modules import is_quantized, transformers_of
from omni_ray.config.spec import DitQuantization
from omni_ray.errors import ConfigError

Convert = Callable[[torch.nn.Linear], None]

INT4_GROUP = 128
FP8_MULTIPLE = 16


def apply_quantization(pipe: DiffusionPipeline, spec: DitQuantization, device: torch.device) -> list[str]:
    """Quantize the components of ``spec`` where they are, computing on ``device``. Returns warnings.

    Comes after tensor parallelism has cut the weights, and before they are offloaded.

    Raises ConfigError where the device or the dtype cannot do it, or the spec names an unknown component.
    """
    if spec.kind in ("none", "gguf"):
        return []
    convert, fits = _format(spec.kind, device)
    warnings, paths = [], list[str]()
    for name, module in _components(pipe, spec).items():
        if is_quantized(module):
            raise ConfigError(f"quantization.kind {spec.kind!r}: {name} is quantized in its checkpoint; set kind: none")
        found = dict(_linears(module))
        paths += found
        linears = {path: linear for path, linear in found.items() if not _matches(path, spec.skip)}
        others = {str(linear.weight.dtype) for linear in linears.values()} - {str(torch.bfloat16)}
        if others and spec.kind != "int8":
            raise ConfigError(
                f"quantization.kind {spec.kind!r} converts weights in bfloat16, but those of {name} are in "
                f"{', '.join(sorted(others))}; set dtype: bfloat16"
            )
        chosen = [linear for path, linear in linears.items() if fits(linear) and not _is_read(path, spec.kind)]
        for linear in chosen:
            _convert(linear, convert, device)
        if not chosen:
            warnings.append(f"quantization {spec.kind}: none of the {len(linears)} layers of {name} that may be was")
    idle = [pattern for pattern in spec.skip if not any(_matches(path, (pattern,)) for path in paths)]
    return warnings + [f"quantization {spec.kind}: no layer is called {pattern!r}, as skip says" for pattern in idle]


def _convert(linear: torch.nn.Linear, convert: Convert, device: torch.device) -> None:
    home = linear.weight.device
    linear.to(device)
    convert(linear)
    linear.to(home)
    linear.requires_grad_(False)


def _format(kind: str, device: torch.device) -> tuple[Convert, Callable[[torch.nn.Linear], bool]]:
    """What converts a Linear in place, and which Linears it can take."""
    if kind == "int8":
        return _by_torchao("Int8WeightOnlyConfig"), lambda linear: True
    if device.type != "cuda":
        raise ConfigError(f"quantization.kind {kind!r} needs a GPU; on a CPU, set kind: int8 or none")
    if kind == "int4":
        # The kernel of PyTorch itself; torchao's other formats want packages of their own.
        convert = _by_torchao("Int4WeightOnlyConfig", group_size=INT4_GROUP, int4_packing_format="tile_packed_to_4d")
        return convert, lambda linear: linear.in_features % INT4_GROUP == 0 and linear.weight.dtype == torch.bfloat16
    if torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise ConfigError(f"quantization.kind 'fp8' needs compute capability 8.9, which {name} lacks; set kind: int8")
    return fp8.convert, lambda linear: all(size % FP8_MULTIPLE == 0 for size in linear.weight.shape)


def _by_torchao(config: str, **options: Any) -> Convert:
    from torchao import quantization  # type: ignore[import-untyped]

    made = getattr(quantization, config)(**options)
    return lambda linear: quantization.quantize_(linear, made, filter_fn=lambda *_: True)


def _components(pipe: DiffusionPipeline, spec: DitQuantization) -> dict[str, torch.nn.Module]:
    if spec.components is None:
        return transformers_of(pipe)
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    if unknown := sorted(set(spec.components) - modules.keys()):
        raise ConfigError(
            f"quantization.components: {type(pipe).__name__} has no {', '.join(unknown)}; it has "
            f"{', '.join(sorted(modules))}"
        )
    return {name: modules[name] for name in spec.components}


def _linears(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Linear]]:
    """The Linears in lists of blocks, with their paths in the component."""
    for path, blocks in module.named_modules():
        if isinstance(blocks, torch.nn.ModuleList) and not _is_inside(path, module):
            for name, part in blocks.named_modules():
                if isinstance(part, torch.nn.Linear):
                    yield f"{path}.{name}", part


def _is_inside(path: str, module: torch.nn.Module) -> bool:
    """Whether the list at ``path`` lies in another one."""
    parents = path.split(".")
    above = [".".join(parents[:i]) for i in range(1, len(parents))]
    return any(isinstance(module.get_submodule(each), torch.nn.ModuleList) for each in above)


def _is_read(path: str, kind: str) -> bool:
    """Whether the model asks this Linear for its dtype, to convert what it gets: T5 does, and fp8 alone holds no
    activations."""
    return kind == "fp8" and path.endswith(".wo")


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(path, pattern) for pattern in patterns)
