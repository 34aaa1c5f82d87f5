"""Loads a diffusers pipeline component by component, so that its progress can be told in bytes."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from transformers import PreTrainedModel

from omni_ray.config.spec import DitGroup
from omni_ray.errors import ConfigError

Progress = Callable[[int, int, str], None]
"""Called with (bytes done, bytes in total, name of the component that comes next)."""

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.gguf")


def resolve(source: str) -> Path:
    """The local folder of a checkpoint; a hub id is downloaded, or found in the local hub cache."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        folder = Path(snapshot_download(source, ignore_patterns=["*.onnx", "*.msgpack", "*.h5", "*.ckpt"]))
    if not (folder / "model_index.json").is_file():
        raise ConfigError(
            f"source {source!r} has no model_index.json, so it is no diffusers pipeline; "
            "name a folder that `save_pretrained` wrote"
        )
    return folder


def load_pipeline(
    folder: Path, dtype: torch.dtype, device: torch.device, group: DitGroup, progress: Progress
) -> DiffusionPipeline:
    """The pipeline of ``folder`` with its weights on ``device``, in eval mode.

    With tensor parallelism the transformers stay mapped from their files, of which nothing is read before each rank has
    cut out its part; move the pipeline to the device then. Where the files have another dtype they are read whole.

    Raises ConfigError where a component's class is unknown to the installed libraries.
    """
    index = json.loads((folder / "model_index.json").read_text())
    components = {
        name: entry
        for name, entry in index.items()
        if _is_model(folder / name) and entry[0] in ("diffusers", "transformers")
    }
    sizes = {name: _num_bytes(folder / name) for name in components}
    done, total, loaded = 0, sum(sizes.values()), {}
    for name, entry in components.items():
        progress(done, total, name)
        cls = _component_class(folder, name, entry)
        module = (
            _random(cls, folder / name, dtype, device)
            if group.load_format == "dummy"
            else cls.from_pretrained(folder / name, dtype=dtype)
        )
        mapped = group.parallel.tensor > 1 and name.startswith("transformer")
        loaded[name] = (module if mapped else module.to(device)).eval().requires_grad_(False)
        done += sizes[name]
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=dtype, trust_remote_code=group.trust_remote_code, **loaded)
    progress(total, total, "")
    return pipe


def _random(cls: Any, folder: Path, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """A component with the weights that its constructor draws, made on the device: the same ones on every rank."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            if issubclass(cls, PreTrainedModel):
                return cast(torch.nn.Module, cls(cls.config_class.from_pretrained(folder)))
            return cast(torch.nn.Module, cls.from_config(cls.load_config(folder)))
    finally:
        torch.set_default_dtype(before)


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
