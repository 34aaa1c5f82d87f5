"""Sequence shards: how the sequences of a forward lie on the ranks.

A length that is no multiple of the ranks is padded with zeros to the next one, so that every shard is as long and every
collective is even. The padding is cut off where the shards are joined, and the attention leaves it out.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from omni_ray.accel.parallel.mesh import Ranks


class Sequence:
    """The sequences of one transformer: the ring's ranks hold blocks, in each of them Ulysses' ranks hold parts."""

    def __init__(self, ring: Ranks, ulysses: Ranks) -> None:
        self.ring = ring
        self.ulysses = ulysses
        self.num_shards = ring.size * ulysses.size
        self.index = ring.index * ulysses.size + ulysses.index
        self.lengths: dict[str, int] = {}
        """The whole lengths of the streams that the forward of now has split."""
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
