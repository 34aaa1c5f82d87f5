"""What quantization and offload do to the weights of a diffusers replica: bytes on the device, in host memory, and over
PCIe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omni_ray.config.spec import DitGroup, DitOffload
from omni_ray.errors import ConfigError
from omni_ray.plan.language import Language
from omni_ray.plan.linear import Transformer
from omni_ray.plan.parts import Part

GIB = 2**30

QUANTIZED_BYTES = {"int8": 1.0, "int4": 0.53, "fp8": 1.0}
"""Bytes of a weight, scales included."""

RING_BLOCKS = 3
"""Blocks of a streaming transformer on the device: the first one, and two buffers."""


@dataclass(frozen=True)
class Weights:
    """Bytes of a component on one rank: on the device all the time, and of what lives in host memory.

    ``is_whole``: it comes to the device as a whole, in the place of another such component. Else its blocks stream.
    """

    part: Part
    resident: float
    offloaded: float = 0.0
    is_whole: bool = False


def weights_of(group: DitGroup, parts: Sequence[Part], width: int) -> tuple[Weights, ...]:
    """Where the weights of each component are."""
    spec = group.offload
    sizes = [num_bytes(group, part, width) for part in parts]
    chosen = _components(spec, parts, sizes)
    num_transformers = sum(part.role == "transformer" for part in parts)
    found = []
    for i, (part, size) in enumerate(zip(parts, sizes, strict=True)):
        if i in chosen:
            found.append(Weights(part, 0.0, size, is_whole=True))
        elif spec.kind == "layerwise" and part.role == "transformer":
            found.append(_streaming(part, size, spec.cpu_offload_gb * GIB / num_transformers))
        else:
            found.append(Weights(part, size))
    return tuple(found)


def num_bytes(group: DitGroup, part: Part, width: int) -> float:
    """Bytes of a component's weights on one rank, quantized as the group says."""
    size = part.num_bytes(width, group.parallel.tensor)
    spec = group.quantization
    if spec.kind == "gguf":
        return _file_bytes(spec.files[part.name]) if part.name in spec.files else size
    chosen = part.role == "transformer" if spec.components is None else part.name in spec.components
    if spec.kind == "none" or not chosen or spec.skip:  # how much `skip` leaves is not known
        return size
    return size * (1 - block_share(part) * (1 - QUANTIZED_BYTES[spec.kind] / width))


def _file_bytes(file: str) -> float:
    try:
        return Path(file).expanduser().stat().st_size
    except OSError as error:
        raise ConfigError(f"quantization.files: the size of {file} is not known: {error.strerror}") from error


def block_share(part: Part) -> float:
    """Which part of the parameters are weights of Linears in blocks."""
    model = part.model
    if isinstance(model, Transformer):
        return sum(each.num_weights for each in model.linears if each.times > 1) / model.num_params
    if isinstance(model, Language):
        return model.num_layers * model.num_layer_params / model.num_params
    return 0.0


def _components(spec: DitOffload, parts: Sequence[Part], sizes: Sequence[float]) -> set[int]:
    """Which components live in host memory as a whole."""
    if spec.kind == "none":
        return set()
    moving = {"model": ("text_encoder", "vae", "transformer"), "sequential": ("text_encoder", "transformer")}
    roles = moving.get(spec.kind, ("text_encoder",))
    chosen, total = set(), 0.0
    candidates = [i for i, part in enumerate(parts) if part.role in roles]
    for i in sorted(candidates, key=lambda i: (parts[i].role == "transformer", -sizes[i])):
        if spec.kind != "model" or not spec.cpu_offload_gb or total < spec.cpu_offload_gb * GIB:
            chosen.add(i)
            total += sizes[i]
    return chosen


def _streaming(part: Part, size: float, limit: float) -> Weights:
    model = part.model
    blocks = model.num_blocks if isinstance(model, Transformer) else 1
    block = size * block_share(part) / blocks
    streamed = min(limit or size, block * (blocks - 1))
    return Weights(part, size - streamed + min(RING_BLOCKS - 1, blocks) * block, streamed)
