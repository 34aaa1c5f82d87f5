"""Answers that a lane gets before they are computed.

A pipeline with classifier-free guidance calls its transformer twice a step, first for one branch, then for the other,
and reads neither answer before it has both. So the gate may answer the first call at once, with :class:`Deferred`
tensors, and both branches wait at the gate together: they can be joined, or computed side by side on two ranks. A
pipeline that does read its first answer early just waits there, as it would have waited in the call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

KEPT = frozenset(
    (torch.Tensor.__getitem__, torch.Tensor.float, torch.Tensor.to, torch.Tensor.neg, torch.Tensor.__neg__)
)
"""What pipelines do with one branch's answer before the other is there: it is noted, and done when the answer comes."""


class Deferred(torch.Tensor):
    """A tensor that ``get`` gives; any use of it, even of its shape, waits for that."""

    get: Callable[[], torch.Tensor]

    @staticmethod
    def of(get: Callable[[], torch.Tensor]) -> Deferred:
        made = torch.Tensor._make_subclass(Deferred, torch.empty(0))
        made.get = functools.cache(get)
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in KEPT and isinstance(args[0], Deferred):
            get, rest = args[0].get, args[1:]
            return Deferred.of(lambda: func(get(), *rest, **kwargs))
        args, kwargs = pytree.tree_map_only(Deferred, lambda tensor: tensor.get(), (args, kwargs))
        return func(*args, **kwargs)


def answer(spec: pytree.TreeSpec, result: Callable[[], Any]) -> Any:
    """Something of the structure ``spec`` whose tensors are those of ``result()``, which is called when one is used."""

    def leaf(index: int) -> torch.Tensor:
        return Deferred.of(lambda: pytree.tree_leaves(result())[index])

    return pytree.tree_unflatten([leaf(i) for i in range(spec.num_leaves)], spec)


def structure(result: Any) -> pytree.TreeSpec | None:
    """The structure of an answer that holds nothing but tensors, else None."""
    leaves, spec = pytree.tree_flatten(result)
    return spec if all(isinstance(leaf, torch.Tensor) for leaf in leaves) else None
