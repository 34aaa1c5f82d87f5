"""Modules that stand where a transformer has blocks, while a cache has its forward."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from omni_ray.accel.parallel.hooks import SplitHook
from omni_ray.config.catalog import Split

Streams = tuple[torch.Tensor | None, ...]
"""What a block hands on: the image's tokens, in many models the text's before them. [batch, tokens, channels]."""

QUERIES = ("to_q", "to_qkv", "to_qkv_mlp_proj")
"""Names of the Linear that a block's modulated input goes to."""


class Entry:
    """How the streams come into a stack whose first block is ``block``: on a sequence axis, some models cut them into
    this rank's shards at that block. A stand-in before it then has to cut them, and the block to leave them."""

    def __init__(self, block: nn.Module, streams: tuple[str, ...]) -> None:
        self._parameters = list(inspect.signature(type(block).forward).parameters)[1:]
        self._block = [block]  # in a list, so that nothing here becomes a part of the model
        self._streams = streams
        self._taken: dict[SplitHook, Mapping[str, Split]] = {}

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, cut: bool) -> Streams:
        """The streams among a block's arguments; ``cut``: they are still whole."""
        given = dict(zip(self._parameters, args, strict=False)) | kwargs
        for hook in self._hooks() if cut else ():
            inputs = self._taken.get(hook, hook.inputs)
            given |= hook.shards(given, {name: split for name, split in inputs.items() if name in self._streams})
        return tuple(given[name] for name in self._streams)

    @contextmanager
    def taken_over(self) -> Iterator[None]:
        """The block leaves the streams as they are, because a stand-in before it cuts them."""
        self._taken = {hook: hook.inputs for hook in self._hooks()}
        for hook, inputs in self._taken.items():
            hook.inputs = {name: split for name, split in inputs.items() if name not in self._streams}
        try:
            yield
        finally:
            for hook, inputs in self._taken.items():
                hook.inputs = inputs
            self._taken = {}

    def hand_on(self, streams: Streams) -> Any:
        return streams if len(streams) > 1 else streams[0]

    @property
    def block(self) -> nn.Module:
        return self._block[0]

    def _hooks(self) -> list[SplitHook]:
        hooks = getattr(self.block, "call_hooks", {}).values()
        return [hook for hook in hooks if isinstance(hook, SplitHook)]


class Tap(nn.Module):
    """Hands on what it gets, and keeps it in ``seen``. It stands before the blocks (``cut``) or after them."""

    seen: Streams = ()

    def __init__(self, entry: Entry, *, cut: bool) -> None:
        super().__init__()
        self._entry = entry
        self._cut = cut

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.seen = self._entry.read(args, kwargs, cut=self._cut)
        return self._entry.hand_on(self.seen)


class Residual(nn.Module):
    """Adds a residual to what it gets. A stream without one ends here: the model's last block drops it."""

    def __init__(self, entry: Entry, rows: Sequence[Streams]) -> None:
        super().__init__()
        self._entry = entry
        self._residuals = list(zip(*rows, strict=True))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        pairs = zip(self._entry.read(args, kwargs, cut=True), self._residuals, strict=True)
        return self._entry.hand_on(tuple(_added(x, residuals) for x, residuals in pairs))


class Front(nn.Module):
    """Runs a block up to the Linear that makes the attention's queries, and leaves with its input."""

    def __init__(self, entry: Entry) -> None:
        super().__init__()
        self._entry = entry
        parts = entry.block.named_modules()
        self._queries = [next(part for name, part in parts if name.rpartition(".")[2] in QUERIES)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        def leave(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            raise Reached(inputs[0])

        block = self._entry.block
        hook = self._queries[0].register_forward_pre_hook(leave)
        try:
            for each in getattr(block, "call_hooks", {}).values():
                args, kwargs = each.pre_forward(block, *args, **kwargs)
            type(block).forward(block, *args, **kwargs)
        finally:
            hook.remove()
        raise RuntimeError(f"the block {type(block).__name__} ended without {', '.join(QUERIES)}")


class Reached(Exception):
    """Carries the signal out of a forward that needs to go no further."""

    def __init__(self, signal: torch.Tensor) -> None:
        super().__init__()
        self.signal = signal


def _added(x: torch.Tensor | None, residuals: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """What a request brings may be longer or shorter than the batch now: models pad lists of prompts at their end to
    the longest in the batch."""
    known = [residual for residual in residuals if residual is not None]
    return None if x is None or not known else x + torch.cat([fitted(residual, x.shape[1]) for residual in known])


def fitted(x: torch.Tensor, length: int) -> torch.Tensor:
    """[batch, tokens, channels], cut or padded with zeros to ``length`` tokens."""
    return x[:, :length] if x.shape[1] >= length else nn.functional.pad(x, (0, 0, 0, length - x.shape[1]))
