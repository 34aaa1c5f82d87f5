"""Sequence shards: cut the sequence in the forward of a transformer, and join it again.

A length that is no multiple of the ranks is padded with zeros to the next one, so that every shard is as long and every
collective is even. The padding is cut off where the shards are joined, and the attention leaves it out.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from diffusers.hooks.context_parallel import ContextParallelGatherHook, ContextParallelSplitHook
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

from omni_ray.accel.parallel.mesh import Ranks
from omni_ray.config.catalog import SequencePlan


class Sequence:
    """How the sequences of one transformer's forward lie on the ranks: the ring's blocks, in them Ulysses' parts."""

    def __init__(self, ring: Ranks, ulysses: Ranks) -> None:
        self.ring = ring
        self.ulysses = ulysses
        self.num_shards = ring.size * ulysses.size
        self.index = ring.index * ulysses.size + ulysses.index
        self.lengths: dict[str, int] = {}
        """The whole lengths of the arguments that the forward of now has split, by their names."""
        self._valid = lru_cache(maxsize=64)(self._find_valid)

    def shard_length(self, length: int) -> int:
        return -(-length // self.num_shards)

    def shard(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's part of ``x``; what lies past the end is zero."""
        length, size = x.shape[dim], self.shard_length(x.shape[dim])
        begin, end = min(self.index * size, length), min((self.index + 1) * size, length)
        part = x.narrow(dim, begin, end - begin)
        if end - begin == size:
            return part
        shape = list(x.shape)
        shape[dim] = size - (end - begin)
        return torch.cat([part, x.new_zeros(shape)], dim)

    def unshard(self, x: torch.Tensor, dim: int, length: int) -> torch.Tensor:
        """The whole of what `shard` cut, ``length`` long."""
        return self.gather(x, dim).narrow(dim, 0, length)

    def gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """The shards of all ranks, padding included."""
        return self.ring.gather(self.ulysses.gather(x, dim), dim)

    def valid(self, streams: tuple[str, ...], shard_length: int, device: torch.device) -> torch.Tensor | None:
        """Positions, in the joined shards of ``streams``, of what is no padding; None where nothing is.

        Each shard is the streams' parts one after the other, ``shard_length`` in all.
        """
        lengths = tuple(self.lengths[name] for name in streams)
        if sum(map(self.shard_length, lengths)) != shard_length:
            raise RuntimeError(
                f"parallel: an attention of {shard_length} tokens per rank does not join {', '.join(streams)} "
                f"of {lengths} tokens on {self.num_shards} ranks; this call of the transformer cannot be split"
            )
        return self._valid(lengths, device)

    def _find_valid(self, lengths: tuple[int, ...], device: torch.device) -> torch.Tensor | None:
        if all(length % self.num_shards == 0 for length in lengths):
            return None
        parts = [
            torch.arange(rank * self.shard_length(length), (rank + 1) * self.shard_length(length)) < length
            for rank in range(self.num_shards)
            for length in lengths
        ]
        return torch.cat(parts).nonzero().squeeze(1).to(device)


class SplitHook(ContextParallelSplitHook):  # type: ignore[misc]
    """diffusers' hook that splits arguments or outputs, for lengths that do not divide."""

    def __init__(self, plan: dict[str | int, ContextParallelInput], sequence: Sequence, optional: frozenset[str]):
        super().__init__(plan, None)
        self.sequence = sequence
        self.optional = optional

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        for name, split in self.metadata.items():
            if isinstance(name, str):
                x, _, _ = self.module_forward_metadata._get_parameter_from_args_kwargs(name, args, kwargs)
                if isinstance(x, torch.Tensor) and x.dim() == split.expected_dims:
                    self.sequence.lengths[name] = x.shape[split.split_dim]
                elif x is not None and name not in self.optional:
                    self._refuse(name, x)
        return super().pre_forward(module, *args, **kwargs)  # type: ignore[no-any-return]

    def _refuse(self, name: str, x: Any) -> None:
        raise RuntimeError(f"parallel: {name} of shape {getattr(x, 'shape', type(x))} cannot be split over ranks")

    def _prepare_cp_input(self, x: torch.Tensor, split: ContextParallelInput) -> torch.Tensor:
        return self.sequence.shard(x, split.split_dim) if x.dim() == split.expected_dims else x


class GatherHook(ContextParallelGatherHook):  # type: ignore[misc]
    """diffusers' hook that joins the shards of an output."""

    def __init__(self, dim: int, sequence: Sequence):
        super().__init__([ContextParallelOutput(gather_dim=dim)], None)
        self.dim = dim
        self.sequence = sequence

    def post_forward(self, module: torch.nn.Module, output: torch.Tensor) -> torch.Tensor:
        return self.sequence.unshard(output, self.dim, self.sequence.lengths["hidden_states"])


def diffusers_plan(plan: SequencePlan, transformer: Any) -> dict[str, Any]:
    """The family's plan in diffusers' terms: the catalog's, or the one on the class."""
    if plan.inputs is None:
        return dict(transformer._cp_plan)
    found: dict[str, Any] = {
        module: {name: ContextParallelInput(split.dim, split.ndim) for name, split in splits.items()}
        for module, splits in plan.inputs.items()
    }
    for module, outputs in plan.outputs.items():
        found[module] = {i: ContextParallelInput(split.dim, split.ndim, True) for i, split in outputs.items()}
    return found | {module: ContextParallelOutput(dim) for module, dim in plan.gather.items()}
