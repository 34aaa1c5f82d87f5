"""Joins waiting calls of the same shape into one forward, and hands each lane its slice of the answer.

Legend: B is a call's own batch (images of one request, doubled by some pipelines for guidance), S a length in tokens.

A call can join another if both go to the same method of the same module and agree in everything but the values along
the batch axis. Its leaves fall in four sorts:

- *batched*: a tensor ``[B, ...]``, or a list of B items. These are concatenated.
- *broadcast*: a tensor ``[1, ...]`` where B > 1. It is expanded to B, then concatenated.
- *shared*: any other tensor, such as FLUX's position ids ``[S, 3]``. All calls must bring equal values.
- *plain*: numbers, strings, None, dicts of these. All calls must bring equal values.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from omni_ray.engine.gate import Call

JOINABLE = ("forward",)
"""Methods whose calls may share a run. An autoencoder's ``decode`` fills the device with one image: together, twelve of
256² took nearly twice as long on a CPU, and memory grows with each."""

_fingerprints = WeakTensorKeyDictionary()


class Unsplittable(Exception):
    """A joined forward gave an answer that cannot be cut into one answer per call."""


def batch_size(call: Call) -> int:
    """B of the call: the leading dimension of its first tensor, or the length of its first list of tensors."""
    for value in (*call.args, *call.kwargs.values()):
        if isinstance(value, Tensor) and value.ndim > 0:
            return int(value.shape[0])
        if _is_tensor_list(value):
            return len(value)
    return 1


def num_tokens(call: Call, patch: int = 1) -> int:
    """Tokens that the call puts through the module: B x S, over all inputs that carry features.

    ``[B, S, C]`` counts S; ``[B, C, H, W]`` and ``[B, C, F, H, W]`` count F x H x W / patch²; a list counts its items;
    token ids ``[B, S]`` count where there is nothing else.
    """
    total = ids = 0
    for value in (*call.args, *call.kwargs.values()):
        for tensor in value if _is_tensor_list(value) else [value]:
            if not isinstance(tensor, Tensor):
                continue
            shape = tensor.shape if tensor is value else (1, *tensor.shape)
            if tensor.is_floating_point() and len(shape) == 3:
                total += shape[0] * shape[1]
            elif tensor.is_floating_point() and len(shape) > 3:
                total += shape[0] * torch.Size(shape[2:]).numel() // patch**2
            elif len(shape) == 2 and not tensor.is_floating_point():
                ids = max(ids, tensor.numel())
    return max(total or ids, 1)


def signature(call: Call) -> Hashable:
    """Two calls may be joined exactly if their signatures are equal."""
    size = batch_size(call)
    leaves, tree = _flatten(call, size)
    positions = tuple(_fingerprint(value) for name, value in sorted(call.kwargs.items()) if _is_positions(name, value))
    kinds = tuple(_leaf_signature(leaf, size) for leaf in leaves)
    alone = call.lane.id if "pixel_values" in call.kwargs else None  # of all images, in a row, whatever the batch
    return call.name, call.method, call.autocast, str(tree), kinds, positions, alone


def _is_positions(name: str, value: Any) -> bool:
    """Whether it is a transformer's position ids. FLUX.2 reads the first request's for the whole batch, so that an
    upright and a lying image of as many tokens must not be joined."""
    return name in ("img_ids", "txt_ids") and isinstance(value, Tensor)


def join(calls: list[Call]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the one forward that answers all ``calls``, in their order. One call is passed on untouched."""
    if len(calls) == 1:
        return calls[0].args, calls[0].kwargs
    sizes = [batch_size(call) for call in calls]
    flat = [_flatten(call, size) for call, size in zip(calls, sizes, strict=True)]
    leaves = [_join_leaf(list(column), sizes) for column in zip(*(leaves for leaves, _ in flat), strict=True)]
    args, kwargs = pytree.tree_unflatten(leaves, flat[0][1])
    return args, kwargs


def split(output: Any, calls: list[Call]) -> list[Any]:
    """Cut the answer of a joined forward into one answer per call, along the batch axis."""
    if len(calls) == 1:
        return [output]
    sizes = [batch_size(call) for call in calls]
    total = sum(sizes)
    leaves, tree = pytree.tree_flatten(output, is_leaf=lambda x: _is_tensor_list(x) and len(x) == total)
    parts: list[list[Any]] = [[] for _ in calls]
    for leaf in leaves:
        cut = _cut(leaf, total, sizes)
        for part, piece in zip(parts, cut, strict=True):
            part.append(piece)
    return [pytree.tree_unflatten(part, tree) for part in parts]


def is_even(calls: list[Call], num_parts: int) -> bool:
    """Whether there is one call, to a transformer, whose batch can be cut into equal parts."""
    return len(calls) == 1 and calls[0].is_denoising and batch_size(calls[0]) % num_parts == 0


def piece(call: Call, index: int, num_parts: int) -> Call:
    """The call with the ``index``-th of ``num_parts`` equal parts of its batch alone."""
    size = batch_size(call)
    rows = slice(index * size // num_parts, (index + 1) * size // num_parts)

    def cut(leaf: Any) -> Any:
        batched = isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == size
        return leaf[rows] if batched or (isinstance(leaf, list) and len(leaf) == size) else leaf

    leaves, tree = _flatten(call, size)
    own = copy.copy(call)
    own.args, own.kwargs = pytree.tree_unflatten([cut(leaf) for leaf in leaves], tree)
    return own


def concat(answers: list[Any]) -> Any:
    """The answer of a call from the answers of its equal parts."""
    flat = [pytree.tree_flatten(answer, is_leaf=_is_tensor_list) for answer in answers]
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    joined = [
        torch.cat(column) if isinstance(column[0], Tensor) else [item for leaf in column for item in leaf]
        for column in map(list, columns)
    ]
    return pytree.tree_unflatten(joined, flat[0][1])


def _cut(leaf: Any, total: int, sizes: list[int]) -> list[Any]:
    if isinstance(leaf, Tensor):
        if leaf.ndim == 0 or leaf.shape[0] != total:
            raise Unsplittable(f"a tensor {tuple(leaf.shape)} where the batch is {total}")
        return list(leaf.split(sizes))
    if isinstance(leaf, list) and len(leaf) == total:
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return [leaf[start : start + size] for start, size in zip(starts, sizes, strict=True)]
    if leaf is None or isinstance(leaf, (bool, int, float, str)):
        return [leaf] * len(sizes)
    raise Unsplittable(f"a {type(leaf).__name__}")


def _flatten(call: Call, size: int) -> tuple[list[Any], pytree.TreeSpec]:
    """Leaves of the arguments; a list of B items is one leaf."""
    return pytree.tree_flatten(
        (call.args, dict(sorted(call.kwargs.items()))), is_leaf=lambda x: isinstance(x, list) and len(x) == size
    )


def _leaf_signature(leaf: Any, size: int) -> Hashable:
    if isinstance(leaf, Tensor):
        if leaf.ndim > 0 and leaf.shape[0] in (size, 1):
            return "batched", leaf.dtype, leaf.device, leaf.shape[1:]
        return "shared", leaf.dtype, leaf.device, leaf.shape, _fingerprint(leaf)
    if isinstance(leaf, list):
        return "list", tuple(sorted({_item_signature(item) for item in leaf}, key=str))
    return "plain", repr(leaf)


def _item_signature(item: Any) -> Hashable:
    """Models that take lists take items of unequal length; images ``[C, F, H, W]`` still join equal sizes only."""
    if isinstance(item, Tensor):
        return item.dtype, item.device, item.shape if item.ndim != 2 else ("ragged", item.shape[1])
    return repr(item) if not isinstance(item, int) else "int"


def _join_leaf(column: list[Any], sizes: list[int]) -> Any:
    first = column[0]
    if isinstance(first, list):
        return [item for leaf in column for item in leaf]
    if isinstance(first, Tensor) and first.ndim > 0 and first.shape[0] in (sizes[0], 1):
        widened = [
            leaf.expand(size, *leaf.shape[1:]) if leaf.shape[0] != size else leaf
            for leaf, size in zip(column, sizes, strict=True)
        ]
        return torch.cat(widened)
    return first


def _is_tensor_list(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and isinstance(value[0], Tensor)


def _fingerprint(tensor: Tensor) -> str:
    """Digest of the values, read once per tensor: a pipeline passes the same object at every step."""
    digest = _fingerprints.get(tensor)
    if digest is None:
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest = _fingerprints[tensor] = hashlib.sha256(raw.numpy().tobytes()).hexdigest()
    return str(digest)


def choose(calls: list[Call], urgency: Callable[[Call], float], budget: int) -> list[Call]:
    """The next batch: the most urgent call (least ``urgency``) and what can join it within ``budget`` tokens."""
    first, *others = sorted(calls, key=urgency)
    used, batch = first.tokens, [first]
    if first.method not in JOINABLE:
        return batch
    for call in others:
        if used + call.tokens <= budget and call.key == first.key:
            batch.append(call)
            used += call.tokens
    return batch


def share_out(chosen: list[Call], others: list[Call], urgency: Callable[[Call], float], num: int) -> list[list[Call]]:
    """The chosen calls in ``num`` shares, one for each part of the cfg axis, or in one if they cannot be shared out.

    A call that is alone gets company: the most urgent other one to a transformer, which need not be of its shape.
    """
    if num == 1 or not chosen[0].is_denoising:
        return [chosen]
    company = sorted((call for call in others if call.is_denoising and call not in chosen), key=urgency)
    found = chosen if len(chosen) >= num else [*chosen, *company][:num]
    if len(found) < num:
        return [chosen]
    return [found[i * len(found) // num : (i + 1) * len(found) // num] for i in range(num)]


def share_at_home(calls: list[Call], urgency: Callable[[Call], float], budget: int, num: int) -> list[list[Call]]:
    """The next calls in ``num`` shares, where each guidance branch of a request is always computed by the same part,
    for what a cache keeps of it is there. A call that brings all its branches is alone, and will be cut."""
    first = min(calls, key=urgency)
    if not first.is_denoising or is_even([first], num):
        return [choose([first], urgency, budget) if first.is_denoising else choose(calls, urgency, budget)]
    single = [call for call in calls if call.is_denoising and not is_even([call], num)]
    homes = [[call for call in single if (call.lane.number + call.ordinal) % num == part] for part in range(num)]
    return [choose(home, urgency, budget) if home else [] for home in homes]


def is_full(calls: list[Call], budget: int) -> bool:
    """Whether some of the calls fill a forward, so that waiting for others of their kind gains nothing."""
    used: dict[Hashable, int] = {}
    for call in calls:
        used[call.key] = used.get(call.key, 0) + call.tokens
        if call.alone or call.method not in JOINABLE or used[call.key] + call.tokens > budget:
            return True
    return False
