"""Weights packed into one block of host memory, from where one copy brings them all to the device.

The host's copy is the master: it is made once, page-locked where there is a GPU, and an eviction copies nothing back.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from omni_ray.errors import ConfigError

ALIGNMENT = 512
"""Bytes. Kernels want tensors to begin at such a multiple."""

MAX_BLOCK_BYTES = 2**30


@dataclass(frozen=True)
class _Place:
    """Where a module holds a weight: in its ``_parameters`` or its ``_buffers``, under a name."""

    held: dict[str, Any]
    name: str


@dataclass(frozen=True)
class _Plain:
    """A plain tensor in the block: bytes from ``start`` on, with these strides."""

    start: int
    num_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def view(self, block: torch.Tensor) -> torch.Tensor:
        flat = block[self.start : self.start + self.num_bytes].view(self.dtype)
        return flat.as_strided(self.shape, self.stride)


class Packed:
    """Some weights in one block, ``num_bytes`` long."""

    def __init__(self, weights: Sequence[tuple[list[_Place], torch.Tensor]], device: torch.device) -> None:
        self._device = device
        self._plain: list[_Plain] = []
        sources: list[torch.Tensor] = []
        self._rebuild = [(places, _take_apart(tensor, sources)) for places, tensor in weights]
        end = 0
        for source in sources:
            start = -(-end // ALIGNMENT) * ALIGNMENT
            end = start + source.numel() * source.element_size()
            self._plain.append(_Plain(start, end - start, source.dtype, tuple(source.shape), source.stride()))
        self.num_bytes = end
        self._host = _locked(end, device)
        if device.type == "cuda" and end:
            weakref.finalize(self, _unlock, self._host.data_ptr()).atexit = False
        for plain, source in zip(self._plain, sources, strict=True):
            plain.view(self._host).copy_(source)
        self._masters = self.weights_in(self._host)
        self.use(self._masters)

    def copy_to(self, block: torch.Tensor) -> None:
        """Copy the weights to the first bytes of ``block``, a byte tensor on the device, in the current stream."""
        block[: self.num_bytes].copy_(self._host, non_blocking=True)

    def weights_in(self, block: torch.Tensor) -> list[Any]:
        """The weights as they lie in ``block`` once it has a copy."""
        plain = iter([each.view(block) for each in self._plain])
        return [rebuild(plain) for _, rebuild in self._rebuild]

    def use(self, weights: list[Any]) -> None:
        """Make the modules use ``weights``, made by `weights_in`."""
        for (places, _), weight in zip(self._rebuild, weights, strict=True):
            for place in places:
                place.held[place.name] = weight

    def bring(self) -> None:
        """Copy the weights to a new block on the device, and use them there."""
        block = torch.empty(self.num_bytes, dtype=torch.uint8, device=self._device)
        self.copy_to(block)
        self.use(self.weights_in(block))

    def park(self) -> None:
        """Use the host's weights again; a block of `bring` is freed."""
        self.use(self._masters)


def pack(modules: Iterable[torch.nn.Module], device: torch.device, max_bytes: int = MAX_BLOCK_BYTES) -> list[Packed]:
    """Move all weights of ``modules`` to host memory, in blocks of up to ``max_bytes``."""
    blocks: list[Packed] = []
    chosen: list[tuple[list[_Place], torch.Tensor]] = []
    chosen_bytes = 0
    for places, tensor in _weights(modules):
        if chosen and chosen_bytes + tensor.nbytes > max_bytes:
            blocks.append(Packed(chosen, device))
            chosen, chosen_bytes = [], 0
        chosen.append((places, tensor))
        chosen_bytes += tensor.nbytes
    return [*blocks, Packed(chosen, device)] if chosen else blocks


def num_bytes(modules: Iterable[torch.nn.Module]) -> int:
    """Bytes of all weights of ``modules``."""
    return sum(sum(plain.numel() * plain.element_size() for plain in _plain(tensor)) for _, tensor in _weights(modules))


def _weights(modules: Iterable[torch.nn.Module]) -> Iterator[tuple[list[_Place], torch.Tensor]]:
    """Every weight once, with all places that share it."""
    found: dict[int, tuple[list[_Place], torch.Tensor]] = {}
    for module in modules:
        for part in module.modules():
            for held in (part._parameters, part._buffers):
                for name, tensor in held.items():
                    if tensor is not None:
                        found.setdefault(id(tensor), ([], tensor))[0].append(_Place(held, name))
    return iter(found.values())


def _plain(tensor: torch.Tensor) -> list[torch.Tensor]:
    plain: list[torch.Tensor] = []
    _take_apart(tensor, plain)
    return plain


def _take_apart(tensor: torch.Tensor, plain: list[torch.Tensor]) -> Callable[[Iterator[torch.Tensor]], Any]:
    """Add the plain tensors of a weight, which quantization wraps, to ``plain``; returns what makes it of others."""
    rebuild = _take_inner_apart(tensor.detach(), plain)
    if isinstance(tensor, torch.nn.Parameter):
        return lambda others: torch.nn.Parameter(rebuild(others), requires_grad=False)
    return rebuild


def _take_inner_apart(tensor: torch.Tensor, plain: list[torch.Tensor]) -> Callable[[Iterator[torch.Tensor]], Any]:
    if not is_traceable_wrapper_subclass(tensor):
        dense = tensor if _is_dense(tensor) else tensor.contiguous()
        plain.append(dense)
        return next
    names, context = tensor.__tensor_flatten__()
    inner = {name: _take_inner_apart(getattr(tensor, name), plain) for name in names}
    cls: Any = type(tensor)
    shape, stride = tensor.shape, tensor.stride()

    def rebuild(others: Iterator[torch.Tensor]) -> Any:
        return cls.__tensor_unflatten__({name: make(others) for name, make in inner.items()}, context, shape, stride)

    return rebuild


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether its elements fill a stretch of memory, in whatever order."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.numel() == max(extent, 0) or tensor.numel() == 0


def _locked(num_bytes: int, device: torch.device) -> torch.Tensor:
    """A block of host memory; page-locked for a GPU, which torch's own allocator would round up to a power of two."""
    if device.type != "cuda" or not num_bytes:
        return torch.empty(num_bytes, dtype=torch.uint8)
    # Whole pages, lest two blocks share one, which can be locked once.
    whole = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    room = torch.empty(whole + mmap.PAGESIZE, dtype=torch.uint8)
    first = -room.data_ptr() % mmap.PAGESIZE
    cudart: Any = torch.cuda.cudart()
    if error := int(cudart.cudaHostRegister(room.data_ptr() + first, whole, 0)):
        raise ConfigError(
            f"offload: {num_bytes / 2**30:.1f} GiB of main memory could not be page-locked (CUDA error {error}); "
            "lower cpu_offload_gb, or give the process more main memory"
        )
    return room[first : first + num_bytes]


def _unlock(address: int) -> None:
    cudart: Any = torch.cuda.cudart()
    cudart.cudaHostUnregister(address)
