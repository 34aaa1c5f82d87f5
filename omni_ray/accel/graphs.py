"""CUDA graphs: a transformer's kernels are recorded once per shape, and replayed by one call.

A forward of a diffusion transformer is some thousand kernels. Where each is short (small images, few latents per rank)
the host takes longer to launch them than the device to run them.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import ModelHook
from torch.utils import _pytree as pytree

from omni_ray.accel.hooks import register
from omni_ray.accel.launches import Launches
from omni_ray.accel.modules import transformers_of
from omni_ray.accel.rotary import keep_no_angles
from omni_ray.config.catalog import can_be_recorded
from omni_ray.config.spec import DitGroup
from omni_ray.errors import ConfigError

logger = logging.getLogger(__name__)

MAX_GRAPHS = 32
"""Shapes of one transformer that are kept; of further ones the one that was not asked for longest goes."""


def apply_cuda_graphs(pipe: DiffusionPipeline, group: DitGroup, device: torch.device) -> None:
    """Have every transformer record its kernels where the group wants it. Comes last: what it calls is recorded.

    Raises ConfigError where the group asks for it and the device is no GPU, or a transformer cannot be recorded.
    """
    is_asked = bool(group.compile.cuda_graphs)
    if is_asked and device.type != "cuda":
        raise ConfigError(f"compile.cuda_graphs: needs a GPU, and the device is {device.type}; set it to null")
    if group.records_on_gpus and device.type == "cuda":
        keep_no_angles()
        for name, transformer in transformers_of(pipe).items():
            if can_be_recorded(type(transformer).__name__):
                register(transformer, "cuda_graphs", CudaGraphs(is_asked=is_asked))
            elif is_asked:
                raise ConfigError(f"compile.cuda_graphs: {name} reads from the device as it runs; set it to null")


@dataclass(frozen=True)
class Recorded:
    """Kernels that read ``inputs`` and write ``outputs``, which stay where they are."""

    graph: torch.cuda.CUDAGraph
    inputs: list[torch.Tensor]
    outputs: list[Any]
    structure: pytree.TreeSpec

    def replay(self, tensors: list[torch.Tensor]) -> Any:
        for mine, given in zip(self.inputs, tensors, strict=True):
            mine.copy_(given)
        self.graph.replay()
        # The next replay, for another request, may begin before this one's answer is read.
        answers = [out.clone() if isinstance(out, torch.Tensor) else out for out in self.outputs]
        return pytree.tree_unflatten(answers, self.structure)


class CudaGraphs(ModelHook):  # type: ignore[misc]
    """The first forwards of a shape run as ever (and are compiled), a later one is recorded, and all others replay it.

    A recording takes longer than a forward, and a shape may be one request's alone: its text has a length that no other
    has. So what is recorded is what the group asked for, the first shape that comes twice, and all those whose forwards
    are seen to wait for the host.

    All graphs of a transformer use the same memory for what lies between inputs and outputs: one runs at a time. A
    transformer that cannot be recorded (it reads from the device, say) fails if the group asked for it, and else runs
    on as ever, with a warning.
    """

    def __init__(self, *, is_asked: bool) -> None:
        super().__init__()
        self._is_asked = is_asked
        self._fails = False
        self._launches = Launches(lambda: torch.cuda.Event(enable_timing=True))
        self._recorded: OrderedDict[Hashable, Recorded] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle()

    def new_forward(self, module: torch.nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        leaves, structure = pytree.tree_flatten((args, kwargs))
        key = (structure, torch.is_autocast_enabled("cuda"), *map(_shape, leaves))
        is_recorded = key in self._recorded or (self._pays(key) and self._record(key, call, leaves, structure))
        if not is_recorded:
            if self._fails:
                return call(*args, **kwargs)
            with self._launches.forward(key):
                return call(*args, **kwargs)
        self._recorded.move_to_end(key)
        return self._recorded[key].replay([leaf for leaf in leaves if isinstance(leaf, torch.Tensor)])

    def _pays(self, key: Hashable) -> bool:
        if self._fails or not self._launches.have_seen(key):
            return False
        return self._is_asked or not self._launches.are_known or self._launches.keep_waiting(key)

    def _record(self, key: Hashable, call: Callable[..., Any], leaves: list[Any], structure: pytree.TreeSpec) -> bool:
        """Whether it could be."""
        leaves = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(leaves, structure)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # Other threads (previews, decoding to files) may use the device meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                began = time.perf_counter()
                outputs, out_structure = pytree.tree_flatten(call(*args, **kwargs))
                self._launches.recorded(time.perf_counter() - began)
        except torch.OutOfMemoryError:
            torch.cuda.set_stream(stream)
            logger.warning("no memory to record another shape; all recordings are dropped")
            self._launches.forget(*self._recorded, key)
            self._recorded.clear()
            return False
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # PyTorch leaves its own in place
            if self._is_asked:
                raise ConfigError(f"compile.cuda_graphs: cannot be recorded ({error}); set it to null") from error
            logger.warning("no CUDA graphs: the transformer cannot be recorded: %s", error)
            self._fails = True
            return False
        while len(self._recorded) >= MAX_GRAPHS:
            evicted, _ = self._recorded.popitem(last=False)
            self._launches.forget(evicted)
        inputs = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        self._recorded[key] = Recorded(graph, inputs, outputs, out_structure)
        return True


def _shape(leaf: Any) -> Hashable:
    if isinstance(leaf, torch.Tensor):
        return leaf.dtype, leaf.shape
    return repr(leaf)
