"""Components whose weights lie in GGUF files. diffusers computes with them: each Linear unpacks its own as it runs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import GGUFQuantizationConfig

from omni_ray.errors import ConfigError


def load_gguf(cls: Any, file: str, folder: Path, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """The component with the config of ``folder`` and the weights of ``file``, on ``device``; it computes in ``dtype``.

    The file may have the names of diffusers or those of the model's authors.

    Raises ConfigError where the file or the gguf package is not there, or diffusers cannot load it as ``cls``.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise ConfigError(f"quantization.files: there is no file {file}; name a GGUF file that is on every node")
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("quantization.kind 'gguf' needs the package gguf; install it, or set kind: none")
    if not hasattr(cls, "from_single_file"):
        raise ConfigError(
            f"quantization.files: diffusers loads no {cls.__name__} from a GGUF file; leave out {folder.name}"
        )
    config = GGUFQuantizationConfig(compute_dtype=dtype)
    try:
        model = cls.from_single_file(
            str(path),
            config=str(folder.parent),
            subfolder=folder.name,
            quantization_config=config,
            dtype=dtype,
            device=device,
        )
    except Exception as error:  # of many kinds, by how the file is broken
        raise ConfigError(f"quantization.files: {file} cannot be loaded as {cls.__name__}: {error!r}") from error
    return cast(torch.nn.Module, model)
