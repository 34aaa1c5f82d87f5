"""Applies the offload of the spec to a loaded pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from diffusers import DiffusionPipeline

from omni_ray.accel.modules import is_transformer, transformers_of
from omni_ray.accel.offload.components import Components
from omni_ray.accel.offload.packed import num_bytes, pack
from omni_ray.accel.offload.ring import Ring
from omni_ray.accel.offload.transfers import Recorder, Transfers
from omni_ray.config.spec import DitOffload
from omni_ray.errors import ConfigError

GIB = 2**30


class Offload:
    """What the engine has to do about offloaded weights: ask for a component before it runs."""

    def __init__(self, components: Components, recorder: Recorder) -> None:
        self._components = components
        self._recorder = recorder

    def need(self, name: str) -> None:
        """Have component ``name`` on the device."""
        self._components.need(name)

    def switch_s(self, name: str) -> float:
        """About how many seconds it takes to bring ``name``; 0 where it need not be brought."""
        return self._components.switch_s(name)

    def take_transfers(self) -> Transfers:
        """What was copied since the last call."""
        return self._recorder.take()


def home(name: str, spec: DitOffload, device: torch.device) -> torch.device:
    """Where component ``name`` of a pipeline is loaded: in host memory, if some of it may stay there."""
    stays = spec.kind == "none" or (spec.kind != "model" and not _moves(name, spec))
    return device if stays else torch.device("cpu")


def _moves(name: str, spec: DitOffload) -> bool:
    """Autoencoders move with ``kind: model`` only."""
    return spec.kind == "model" or is_transformer(name) or "encoder" in name


def apply_offload(pipe: DiffusionPipeline, spec: DitOffload, device: torch.device) -> Offload | None:
    """Keep weights in host memory, as ``spec`` says, and bring the rest to ``device``.

    Comes after what changes weights (parallel, quantization), and before `apply_compile`.

    Raises ConfigError where a transformer has no lists of blocks to stream.
    """
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    if spec.kind == "none":
        return None
    recorder = Recorder(device)
    names = [name for name in modules if _moves(name, spec)]
    if spec.kind == "layerwise":
        transformers = transformers_of(pipe)
        _stream(transformers, spec, device, recorder)
        names = [name for name in names if name not in transformers]
    elif spec.cpu_offload_gb:
        names = _within(names, modules, spec.cpu_offload_gb * GIB)
    packed = {name: pack([modules[name]], device) for name in names}
    for name, module in modules.items():
        if name not in packed and not (spec.kind == "layerwise" and is_transformer(name)):
            module.to(device)
    return Offload(Components(packed, recorder), recorder)


def _within(names: Iterable[str], modules: dict[str, torch.nn.Module], max_bytes: float) -> list[str]:
    """Components of about ``max_bytes``: first those that a request needs once, the largest of them before others."""
    chosen, total = [], 0
    for name in sorted(names, key=lambda name: (is_transformer(name), -num_bytes([modules[name]]))):
        if total < max_bytes:
            chosen.append(name)
            total += num_bytes([modules[name]])
    return chosen


def _stream(transformers: dict[str, Any], spec: DitOffload, device: torch.device, recorder: Recorder) -> None:
    """Let blocks of every transformer stream, about ``cpu_offload_gb`` of them all; the rest goes to the device."""
    share = spec.cpu_offload_gb * GIB / len(transformers)
    for name, transformer in transformers.items():
        blocks = list(_streamable(transformer))
        if not blocks:
            raise ConfigError(
                f"offload.kind layerwise: {name} ({type(transformer).__name__}) has no list of blocks to stream; "
                "set kind: model"
            )
        streamed = _spread(blocks, share)
        packed = [(block, pack([block], device, max_bytes=2**62)[0]) for block in streamed]
        held = {id(weight) for block in streamed for weight in (*block.parameters(), *block.buffers())}
        _move_rest(transformer, held, device)
        Ring(packed, device, recorder)


def _streamable(transformer: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The items of the transformer's lists of blocks, in their order, but for the first of each: a cache looks into
    that at every step, and the others may be skipped."""
    for child in transformer.children():
        if isinstance(child, torch.nn.ModuleList):
            yield from list(child)[1:]


def _spread(blocks: list[torch.nn.Module], max_bytes: float) -> list[torch.nn.Module]:
    """All blocks, or so many that they have about ``max_bytes``, evenly spread, so that copies hide behind those that
    stay."""
    if not max_bytes:
        return blocks
    count = min(len(blocks), max(1, round(max_bytes / (num_bytes(blocks) / len(blocks)))))
    return [blocks[i * len(blocks) // count] for i in range(count)]


def _move_rest(transformer: torch.nn.Module, held: set[int], device: torch.device) -> None:
    """Move every weight to the device but those in ``held``."""
    for part in transformer.modules():
        for weights in (part._parameters, part._buffers):
            for name, weight in weights.items():
                if weight is not None and id(weight) not in held:
                    moved: Any = weight.detach().to(device)
                    is_parameter = isinstance(weight, torch.nn.Parameter)
                    weights[name] = torch.nn.Parameter(moved, requires_grad=False) if is_parameter else moved
