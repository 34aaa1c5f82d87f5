"""Loads a diffusers model without its weights, and reads those in parallel straight to the device.

As `from_pretrained` would make it, several times as fast. What it cannot load so raises `Unsuitable`, with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import accelerate
import torch
from diffusers import ModelMixin
from diffusers.models.modeling_utils import no_init_weights

from omni_ray.accel import reader
from omni_ray.accel.parallel.mesh import Ranks
from omni_ray.accel.parallel.tensor import shard_specs
from omni_ray.accel.reader import DEFAULT, Options, Part, Progress, Stored, Target
from omni_ray.config.catalog import FAMILIES

FILE = "diffusion_pytorch_model.safetensors"
INDEX = f"{FILE}.index.json"
MAX_NAMES = 3


class Unsuitable(Exception):
    """Why a component has to be loaded by `from_pretrained`."""


def load_model(
    cls: Any,
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress = lambda done, total: None,
    options: Options = DEFAULT,
) -> torch.nn.Module:
    """The model of a folder that ``save_pretrained`` wrote, with its weights on ``device``, in eval mode.

    Raises `Unsuitable` before anything is read, ConfigError where a file is broken.
    """
    model, stored = empty_model(cls, folder, dtype)
    _fill(model, stored, dtype, device, {}, progress, options)
    return model.to(device)


def read_parts(
    model: Any,
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    ranks: Ranks,
    progress: Progress = lambda done, total: None,
) -> None:
    """Read this rank's part of a model that `empty_model` made and `apply_parallel` cut."""
    whole, stored = empty_model(type(model), folder, dtype)
    plan = FAMILIES[type(model).__name__].tensor
    assert plan is not None
    specs, parts = shard_specs(whole, plan, ranks.size), {}
    for name, tensor in model.state_dict().items():
        shape, spec = stored[name].shape, specs.get(name)
        if tuple(tensor.shape) != shape:  # those that the plan does not name are norms, of one dimension
            dim, blocks = (spec.dim, tuple(spec.block_sizes)) if spec else (0, shape)
            parts[name] = Part(dim, blocks, ranks.index, ranks.size)
    _fill(model, stored, dtype, device, parts, progress)
    model.to(device)


def empty_model(cls: Any, folder: Path, dtype: torch.dtype) -> tuple[torch.nn.Module, dict[str, Stored]]:
    """The model with its parameters on the meta device, and where they are in its files.

    Raises `Unsuitable` where the files do not hold exactly the model's weights, or `from_pretrained` does more than to
    load them.
    """
    if not issubclass(cls, ModelMixin) or cls.from_pretrained.__func__ is not ModelMixin.from_pretrained.__func__:
        raise Unsuitable(f"{cls.__name__} has its own way to load")
    config = cls.load_config(folder)
    if config.get("quantization_config"):
        raise Unsuitable("its weights are quantized")
    try:
        stored = _stored(folder)
    except reader.UnknownFormat as error:
        raise Unsuitable(str(error)) from error
    with default_dtype(dtype), no_init_weights(), accelerate.init_empty_weights(include_buffers=False):
        model: Any = cls.from_config(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if missing := sorted(shapes.keys() - stored.keys()):
        raise Unsuitable(f"the files lack {_some(missing)}")
    if surplus := sorted(stored.keys() - shapes.keys()):
        raise Unsuitable(f"the model has no {_some(surplus)}")
    if other := [name for name, shape in shapes.items() if stored[name].shape != shape]:
        raise Unsuitable(f"the files have another shape of {_some(other)}")
    model.register_to_config(_name_or_path=folder)
    return cast(torch.nn.Module, model.eval()), stored


def _fill(
    model: torch.nn.Module,
    stored: Mapping[str, Stored],
    dtype: torch.dtype,
    device: torch.device,
    parts: Mapping[str, Part],
    progress: Progress,
    options: Options = DEFAULT,
) -> None:
    """Put the weights in place of the model's parameters and persistent buffers. Floating-point ones become ``dtype``.

    Args:
        parts: what this rank keeps of parameters that are cut; the model has their shapes already.
    """
    tensors, targets = dict(model.state_dict(keep_vars=True)), []
    dtypes = {name: _dtype(model, name, stored[name].dtype, dtype) for name in tensors}
    _reserve(sum(old.numel() * dtypes[name].itemsize for name, old in tensors.items()), device)
    for name, old in tensors.items():
        part, shape = parts.get(name), stored[name].shape
        shape = part.shape(shape) if part else shape
        assert shape == old.shape, f"{name}: {tuple(old.shape)} in the model, {shape} to read"
        new = torch.empty(shape, dtype=dtypes[name], device=device)
        targets.append(Target(stored[name], new, part))
        _put(model, name, new, old)
    reader.read(targets, device, progress, options)


def _dtype(model: Any, name: str, stored: torch.dtype, wanted: torch.dtype) -> torch.dtype:
    """What `from_pretrained` makes of a tensor when it is asked for the dtype ``wanted``."""
    if not stored.is_floating_point:
        return stored
    keep: Sequence[str] | str = model._keep_in_fp32_modules or ()
    keep = [keep] if isinstance(keep, str) else keep
    return torch.float32 if set(keep).intersection(name.split(".")) else wanted


def _reserve(num_bytes: int, device: torch.device) -> None:
    """Have PyTorch take so much memory from the GPU at once: it is slow to ask for each tensor's."""
    if device.type == "cuda":
        torch.empty(num_bytes, dtype=torch.uint8, device=device)


def _put(model: torch.nn.Module, name: str, new: torch.Tensor, old: torch.Tensor) -> None:
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(old, torch.nn.Parameter):
        module._parameters[key] = torch.nn.Parameter(new, requires_grad=old.requires_grad and new.is_floating_point())
    else:
        module._buffers[key] = new


def _stored(folder: Path) -> dict[str, Stored]:
    """Where the weights are: in the files of the index where there is one, as `from_pretrained` looks for them."""
    if not (folder / INDEX).is_file():
        if not (folder / FILE).is_file():
            raise Unsuitable(f"it has no {FILE}")
        return reader.read_header(folder / FILE)
    files = json.loads((folder / INDEX).read_text())["weight_map"]
    headers = {file: reader.read_header(folder / file) for file in sorted(set(files.values()))}
    if absent := [name for name, file in files.items() if name not in headers[file]]:
        raise Unsuitable(f"the files lack {_some(absent)} of the index")
    return {name: headers[file][name] for name, file in files.items()}


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + rest


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
