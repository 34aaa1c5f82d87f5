"""The cfg axis: parts of a gang that compute different calls of one turn, and then tell each other the answers."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.utils import _pytree as pytree

from omni_ray.accel.parallel.mesh import group_of, parts_of
from omni_ray.engine.lockstep import confirm_failure, same
from omni_ray.errors import EngineFailed

Answer = Any
"""What a call gave: tensors in tuples, lists or diffusers outputs. Or an exception."""


class Exchange:
    """``index`` is this rank's part of ``size``. Ranks that differ in it alone form a group, and talk over it."""

    def __init__(self, mesh: DeviceMesh) -> None:
        axis = mesh["cfg"]
        self.index, self.size = axis.get_local_rank(), axis.size()
        self._device = torch.device(mesh.device_type)
        self._data = axis.get_group()
        self._ranks: list[int] = dist.get_process_group_ranks(self._data)
        parts = parts_of(mesh)
        self._words = group_of([list(ranks) for ranks in zip(*parts, strict=True)], "gloo")
        self._own_part = group_of(parts, "gloo")

    def confirm_failure(self) -> None:
        """As `Lockstep.confirm_failure`, among the ranks of this part: the others computed something else."""
        confirm_failure(self._own_part)

    def same(self, value: list[bool]) -> list[bool]:
        """As `Lockstep.same`, among the ranks of this part."""
        return same(value, self._own_part)

    def all(self, own: list[Answer], skipped: list[bool | None]) -> list[tuple[list[Answer], list[bool | None]]]:
        """Every part's answers, and what its cache decided about them, in the order of the parts; these are ``own``."""
        return [self._from(part, own, skipped) for part in range(self.size)]

    def _from(self, part: int, own: list[Answer], skipped: list[bool | None]) -> tuple[list[Answer], list[bool | None]]:
        source, sends = self._ranks[part], part == self.index
        box: list[Any] = [([_describe(answer) for answer in own], skipped) if sends else None]
        dist.broadcast_object_list(box, src=source, group=self._words)
        answers, (descriptions, told) = [], box[0]
        for i, (error, spec, tensors) in enumerate(descriptions):
            leaves = pytree.tree_leaves(own[i]) if sends and error is None else []
            for j, (shape, dtype) in enumerate(tensors):
                tensor = leaves[j].contiguous() if sends else torch.empty(shape, dtype=dtype, device=self._device)
                dist.broadcast(tensor, src=source, group=self._data)
                if not sends:
                    leaves.append(tensor)
            answers.append(pytree.tree_unflatten(leaves, spec) if spec is not None else EngineFailed(str(error)))
        return (own if sends else answers), told


def _describe(answer: Answer) -> tuple[str | None, pytree.TreeSpec | None, list[tuple[torch.Size, torch.dtype]]]:
    """What the others need to know before the tensors come: the error, if it is one, structure, shapes and dtypes."""
    if isinstance(answer, BaseException):
        return f"{type(answer).__name__}: {answer}", None, []
    leaves, spec = pytree.tree_flatten(answer)
    return None, spec, [(leaf.shape, leaf.dtype) for leaf in leaves]
