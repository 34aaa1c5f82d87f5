"""What a checkpoint consists of, from its ``config.json`` files and the headers of its safetensors files.

No weight is read. A source is looked up as a local folder, as a ``demo:`` model, in the local hub cache, and last among
the configs that come with the package (``shapes/``), which have no weights: then sizes are computed from the configs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omni_ray.errors import ConfigError
from omni_ray.sources import resolve_source

SHAPES = Path(__file__).parent / "shapes"
MAX_HEADER_BYTES = 100 * 2**20

FLOATS = ("F64", "F32", "F16", "BF16")
PACKED_BYTES = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}
"""Bytes of a value in the number formats of safetensors that a load leaves as they are; of all others 1."""


WITHOUT_WEIGHTS = ("Tokenizer", "Scheduler", "Processor", "Extractor", "Guid")
"""What is in the names of the classes of a pipeline's components that have no weights."""


@dataclass(frozen=True)
class Component:
    """A part with weights. ``cls`` is its class; ``num_params`` is 0 where no weights are here.

    ``num_packed_bytes`` are those of integer and 8-bit tensors, which no dtype of the YAML changes.
    """

    name: str
    library: str
    cls: str
    config: dict[str, Any] = field(hash=False)
    num_params: int = 0
    num_packed_bytes: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """A diffusers pipeline of class ``pipeline``, or, where that is empty, one language model."""

    folder: Path
    pipeline: str
    components: tuple[Component, ...]
    defaults: dict[str, Any] = field(hash=False)


def is_here(source: str) -> bool:
    """Whether the configs of a source are on this machine."""
    try:
        find_folder(source)
    except ConfigError:
        return False
    return True


def read_checkpoint(source: str) -> Checkpoint:
    """The checkpoint of a ``source`` of the spec.

    Raises:
        ConfigError: nothing of it is on this machine, or its files are broken.
    """
    folder = find_folder(source)
    index = folder / "model_index.json"
    if not index.is_file():
        config = _json(folder / "config.json")
        cls = next(iter(config.get("architectures") or ()), "")
        return Checkpoint(folder, "", (_component(folder, "model", "transformers", cls, config),), {})
    entries = _json(index)
    named = {name: entry for name, entry in entries.items() if isinstance(entry, list) and len(entry) == 2 and entry[0]}
    parts = [
        _component(folder / name, name, library, cls, _json(folder / name / "config.json"))
        for name, (library, cls) in named.items()
        if not any(word in cls for word in WITHOUT_WEIGHTS)
    ]
    shipped = folder / "omni_ray.json"
    defaults = _json(shipped).get("defaults", {}) if shipped.is_file() else {}
    return Checkpoint(folder, str(entries.get("_class_name", "")), tuple(parts), defaults)


def find_folder(source: str) -> Path:
    """The folder with the checkpoint's configs. Raises ConfigError where there is none."""
    folder = Path(resolve_source(source))
    for place in (folder, _hub_cache(source), SHAPES / source.replace("/", "--")):
        if place and any((place / name).is_file() for name in ("model_index.json", "config.json")):
            return place
    if folder.is_dir():
        raise ConfigError(f"source {source!r} has neither model_index.json nor config.json, so it is no checkpoint")
    raise ConfigError(
        f"source {source!r} is no folder here, not in the hub cache, and its configs do not come with omni_ray; "
        f"run `hf download {source} --include '*.json'`, or name a folder that holds its config files"
    )


def _hub_cache(source: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache  # it takes a tenth of a second

    for name in ("model_index.json", "config.json"):
        try:
            found = try_to_load_from_cache(source, name)
        except ValueError:  # no valid hub id
            return None
        if isinstance(found, str):
            return Path(found).parent
    return None


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds no JSON object")
    return value


def _component(folder: Path, name: str, library: str, cls: str, config: dict[str, Any]) -> Component:
    num_params = num_packed_bytes = 0
    for file in _weight_files(folder):
        for dtype, count in _tensors(file):
            if dtype in FLOATS:
                num_params += count
            else:
                num_packed_bytes += count * PACKED_BYTES.get(dtype, 1)
    return Component(name, library, cls, config, num_params, num_packed_bytes)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that would be loaded: those of the index, or the one file of the usual name, or all."""
    for index in sorted(folder.glob("*.safetensors.index.json")):
        files = {folder / file for file in _json(index).get("weight_map", {}).values()}
        if files and all(file.is_file() for file in files):
            return sorted(files)
    usual = [folder / name for name in ("model.safetensors", "diffusion_pytorch_model.safetensors")]
    return next(([file] for file in usual if file.is_file()), sorted(folder.glob("*.safetensors")))


def _tensors(file: Path) -> Iterator[tuple[str, int]]:
    """Number format and number of values of each tensor of a safetensors file."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header: dict[str, Any] = json.loads(stream.read(min(length, MAX_HEADER_BYTES)))
        for name, entry in header.items():
            if name != "__metadata__":
                yield entry["dtype"], math.prod(entry["shape"])
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise ConfigError(f"{file} is no whole safetensors file: {error}") from error
