"""Layer-wise offload: the blocks of a transformer stream through a ring of device buffers.

While a block computes, the next one is copied in a stream of its own. Copies run without a gap as long as they take
longer than the computation, and cost nothing where they take less.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from diffusers.hooks import ModelHook

from omni_ray.accel import hooks
from omni_ray.accel.offload.packed import Packed
from omni_ray.accel.offload.transfers import Recorder

NUM_BUFFERS = 2
HOOK = "layerwise offload"


class Ring:
    """``blocks`` are modules and their packed weights, in the order in which the forward calls them."""

    def __init__(
        self, blocks: Sequence[tuple[torch.nn.Module, Packed]], device: torch.device, recorder: Recorder
    ) -> None:
        self._packed = [packed for _, packed in blocks]
        self._recorder = recorder
        longest = max(packed.num_bytes for packed in self._packed)
        self._buffers = [torch.empty(longest, dtype=torch.uint8, device=device) for _ in range(NUM_BUFFERS)]
        self._holds: list[int | None] = [None] * NUM_BUFFERS
        self._made: dict[tuple[int, int], list[Any]] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied = [torch.cuda.Event() for _ in self._buffers] if self._stream else []
        self._used = [torch.cuda.Event() for _ in self._buffers] if self._stream else []
        for i, (module, _) in enumerate(blocks):
            hooks.register(module, HOOK, _Need(self, i))

    def need(self, index: int) -> None:
        """Have block ``index`` on the device for what is queued next, and start to copy the one after it."""
        if index not in self._holds:
            self._copy(index, self._holds.index(None) if None in self._holds else 0)
        buffer = self._holds.index(index)
        if self._stream:
            with self._recorder.wait():
                torch.cuda.current_stream().wait_event(self._copied[buffer])
        self._packed[index].use(self._weights(index, buffer))
        following = (index + 1) % len(self._packed)
        if following not in self._holds:
            self._copy(following, (buffer + 1) % NUM_BUFFERS)

    def done(self, index: int) -> None:
        """What block ``index`` computes is queued: its buffer may be written over after that."""
        self._packed[index].park()
        if self._stream:
            self._used[self._holds.index(index)].record()

    def _weights(self, index: int, buffer: int) -> list[Any]:
        """Made once: to make them for each call would cost the host as much as the forward itself."""
        if (index, buffer) not in self._made:
            self._made[index, buffer] = self._packed[index].weights_in(self._buffers[buffer])
        return self._made[index, buffer]

    def _copy(self, index: int, buffer: int) -> None:
        packed = self._packed[index]
        if self._stream:
            self._stream.wait_event(self._used[buffer])
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            with self._recorder.copy(packed.num_bytes, hidden=True):
                packed.copy_to(self._buffers[buffer])
            if self._stream:
                self._copied[buffer].record()
        self._holds[buffer] = index


class _Need(ModelHook):  # type: ignore[misc]
    """Around the call of a block."""

    def __init__(self, ring: Ring, index: int) -> None:
        super().__init__()
        self._ring = ring
        self._index = index

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._ring.need(self._index)
        return args, kwargs

    def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
        self._ring.done(self._index)
        return output
