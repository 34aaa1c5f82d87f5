"""Loads a diffusers pipeline component by component, and tells its progress in bytes."""

from __future__ import annotations

import functools
import importlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from transformers import PreTrainedModel

from omni_ray.accel import weights
from omni_ray.accel.gguf import load_gguf
from omni_ray.accel.modules import transformers_of
from omni_ray.accel.offload import home
from omni_ray.accel.parallel.mesh import Ranks
from omni_ray.config.spec import DitGroup
from omni_ray.errors import ConfigError

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]
"""Called with (bytes done, bytes in total, name of the component that is read)."""

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.gguf")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


def resolve(source: str, allow_pickle_weights: bool = False) -> Path:
    """The local folder of a checkpoint; a hub id is downloaded, or found in the local hub cache."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        unread = ["*.onnx", "*.msgpack", "*.h5", *(["*.ckpt"] if allow_pickle_weights else PICKLES)]
        folder = Path(snapshot_download(source, ignore_patterns=unread))
    if not (folder / "model_index.json").is_file():
        raise ConfigError(
            f"source {source!r} has no model_index.json, so it is no diffusers pipeline; "
            "name a folder that `save_pretrained` wrote"
        )
    return folder


def load_pipeline(
    folder: Path, dtype: torch.dtype, device: torch.device, group: DitGroup, progress: Progress
) -> DiffusionPipeline:
    """The pipeline of ``folder`` with its weights on ``device``, in eval mode; what is offloaded stays on the host.

    With tensor parallelism nothing is read of the transformers yet: cut them, then call `read_parts`. (On a CPU, and
    where they cannot be read in parts, they are mapped from their files; those of another dtype are read whole.)

    Raises ConfigError where a component's class is unknown to the installed libraries, or its weights are pickled and
    the group does not allow that.
    """
    index = json.loads((folder / "model_index.json").read_text())
    components = {
        name: entry
        for name, entry in index.items()
        if _is_model(folder / name) and entry[0] in ("diffusers", "transformers")
    }
    files = group.quantization.files
    if unknown := sorted(files.keys() - components.keys()):
        raise ConfigError(f"quantization.files: {folder} has no {', '.join(unknown)}, but {', '.join(components)}")
    in_parts = {name for name in components if group.parallel.tensor > 1 and name.startswith("transformer")}
    sizes = {name: 0 if name in in_parts else _num_bytes(folder / name) for name in components.keys() - files.keys()}
    done, total, loaded, pickles = 0, sum(sizes.values()), {}, group.allow_pickle_weights
    for name, entry in components.items():
        progress(done, total, name)
        cls = _component_class(folder, name, entry)
        if not group.allow_pickle_weights and group.load_format != "dummy" and name not in files:
            _refuse_pickles(folder / name)
        place = home(name, group.offload, device)
        if name in files:
            module = load_gguf(cls, files[name], folder / name, dtype, place)
        elif group.load_format == "dummy":
            module = _random(cls, folder / name, dtype, device).to(place)
        elif name in in_parts:
            module = _empty(cls, folder / name, dtype, place, pickles)
        else:
            report = functools.partial(_report, progress, name, done, total)
            module = _load(cls, folder / name, dtype, place, report, pickles)
        loaded[name] = module.eval().requires_grad_(False)
        done += sizes.get(name, 0)
    # DiffusionPipeline itself ignores what is passed for a component that is optional in the pipeline's class.
    pipeline = getattr(diffusers, str(index["_class_name"]), DiffusionPipeline)
    options = {"trust_remote_code": group.trust_remote_code, "use_safetensors": _use_safetensors(pickles)}
    pipe = pipeline.from_pretrained(folder, dtype=dtype, **options, **loaded)
    pipe.register_modules(**loaded)
    progress(total, total, "")
    return cast(DiffusionPipeline, pipe)


def read_parts(
    pipe: DiffusionPipeline,
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    group: DitGroup,
    progress: Progress,
    ranks: Ranks,
) -> None:
    """Read this rank's part of the transformers, which are cut, and move them where `load_pipeline` has the rest.

    Args:
        ranks: the tensor dimension of the mesh.
    """
    for name, transformer in transformers_of(pipe).items():
        place = home(name, group.offload, device)
        if any(parameter.is_meta for parameter in transformer.parameters()):
            report = functools.partial(_report, progress, name, 0, 0)
            weights.read_parts(transformer, folder / name, dtype, place, ranks, report)
        transformer.to(place)


def _report(progress: Progress, name: str, before: int, total: int, done: int, own_total: int) -> None:
    """``done`` of a component, after ``before`` of other ones; where no ``total`` of all is known, its own counts."""
    progress(before + done, total or own_total, name)


def _load(
    cls: Any,
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None],
    pickles: bool = False,
) -> torch.nn.Module:
    """A component on the device."""
    slowly = functools.partial(_slowly, cls, folder, dtype=dtype, use_safetensors=_use_safetensors(pickles))
    if device.type == "cpu":  # from_pretrained maps the files: nothing is read before it is used
        return cast(torch.nn.Module, slowly())
    if issubclass(cls, PreTrainedModel):  # transformers copies from mapped files in several threads
        return cast(torch.nn.Module, slowly(device_map={"": device}).to(device))
    try:
        return weights.load_model(cls, folder, dtype, device, progress)
    except weights.Unsuitable as reason:
        logger.warning("%s is loaded slowly, by from_pretrained: %s", folder, reason)
        return cast(torch.nn.Module, slowly().to(device))


def _slowly(cls: Any, folder: Path, **options: Any) -> Any:
    """Raises ConfigError where the weights are quantized by a library that is not installed."""
    try:
        return cls.from_pretrained(folder, **options)
    except ImportError as error:
        raise ConfigError(f"{folder} cannot be loaded: {error}") from error


def _empty(cls: Any, folder: Path, dtype: torch.dtype, device: torch.device, pickles: bool = False) -> torch.nn.Module:
    """A component of which a part will be read."""
    if device.type != "cpu":
        try:
            return weights.empty_model(cls, folder, dtype)[0]
        except weights.Unsuitable as reason:
            logger.warning("%s is loaded slowly, by from_pretrained: %s", folder, reason)
    return cast(torch.nn.Module, _slowly(cls, folder, dtype=dtype, use_safetensors=_use_safetensors(pickles)))


def _use_safetensors(pickles: bool) -> bool | None:
    """What `from_pretrained` is told: None takes pickles where there is nothing else, True never does."""
    return None if pickles else True


def _refuse_pickles(folder: Path) -> None:
    if any(folder.glob("*.safetensors")) or any(folder.glob("*.gguf")):
        return
    found = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    raise ConfigError(
        f"{folder} has no weights in safetensors{f', only {found[0]}' if found else ''}; reading a pickle can run code "
        "that is in it: take a checkpoint with *.safetensors, or set allow_pickle_weights: true of the model"
    )


def _random(cls: Any, folder: Path, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """A component with the weights that its constructor draws, made on the device: the same ones on every rank."""
    torch.manual_seed(0)
    with weights.default_dtype(dtype), torch.device(device):
        if issubclass(cls, PreTrainedModel):
            return cast(torch.nn.Module, cls(cls.config_class.from_pretrained(folder)))
        return cast(torch.nn.Module, cls.from_config(cls.load_config(folder)))


def _is_model(folder: Path) -> bool:
    """Whether the component has weights: only then its folder has a ``config.json``."""
    return (folder / "config.json").is_file()


def _component_class(folder: Path, name: str, entry: list[str]) -> Any:
    library, cls = entry
    found = getattr(importlib.import_module(library), cls, None)
    if found is None:
        raise ConfigError(
            f"{folder / 'model_index.json'}: {name} is a {library}.{cls}, "
            f"which the installed {library} does not have; install a newer one"
        )
    return found


def _num_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for pattern in WEIGHT_FILES for file in folder.glob(pattern))
