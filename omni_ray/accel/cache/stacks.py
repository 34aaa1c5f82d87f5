"""The stacks of blocks of a transformer, run in part: up to the first block's modulation, or with a residual in place
of all blocks.

A transformer runs its own forward each time, with its lists of blocks replaced: so what lies before and after the
blocks (embeddings, output norm and projection) is computed for the step at hand, whatever the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Streams = tuple[torch.Tensor | None, ...]
"""What a block hands on: the image's tokens, in many models the text's before them. [batch, tokens, channels]."""

QUERIES = ("to_q", "to_qkv", "to_qkv_mlp_proj")
"""Names of the Linear that a block's modulated input goes to."""


class Stacks:
    """The stacks of ``transformer``, in the order of its forward: their names, and the arguments of their blocks that
    are handed on from one to the next."""

    def __init__(self, transformer: nn.Module, stacks: Mapping[str, tuple[str, ...]]) -> None:
        self._transformer = transformer
        self._streams = stacks
        self._lists = {name: getattr(transformer, name) for name in stacks}

    def signal(self, run: Callable[[], Any]) -> torch.Tensor:
        """The modulated input of the first block's attention, [batch, tokens, channels], in the forward that ``run``
        starts, which goes no further."""
        first = next(iter(self._lists))
        try:
            with self._replaced({first: [_Front(self._lists[first][0])]}):
                run()
        except _Reached as reached:
            return reached.signal
        raise RuntimeError(f"the forward of {type(self._transformer).__name__} did not come to {first}")

    def record(self, run: Callable[[], Any]) -> tuple[Any, list[Streams]]:
        """The answer of the forward that ``run`` starts, and what each stack added to its streams."""
        taps = {name: [_Tap(blocks[0], self._streams[name]) for _ in range(2)] for name, blocks in self._lists.items()}
        with self._replaced({name: [before, *self._lists[name], after] for name, (before, after) in taps.items()}):
            answer = run()
        return answer, [_difference(before.seen, after.seen) for before, after in taps.values()]

    def reuse(self, run: Callable[[], Any], residuals: Sequence[Sequence[Streams]]) -> Any:
        """The answer of the forward that ``run`` starts, where the stacks compute nothing: each adds the residuals that
        the requests in the batch bring, one after the other."""
        parts = zip(self._lists.items(), residuals, strict=True)
        blocks = {name: [_Residual(list_[0], self._streams[name], rows)] for (name, list_), rows in parts}
        with self._replaced(blocks):
            return run()

    @contextmanager
    def _replaced(self, lists: Mapping[str, Sequence[nn.Module]]) -> Iterator[None]:
        modules = self._transformer._modules
        for name, blocks in lists.items():
            modules[name] = nn.ModuleList(blocks)
        try:
            yield
        finally:
            modules.update(self._lists)


class _Reached(Exception):
    """Carries the signal out of a forward that needs to go no further."""

    def __init__(self, signal: torch.Tensor) -> None:
        super().__init__()
        self.signal = signal


class _Block(nn.Module):
    """Stands where blocks like ``like`` stand, and hands on ``streams``, arguments of theirs, as they would."""

    def __init__(self, like: nn.Module, streams: tuple[str, ...]) -> None:
        super().__init__()
        self._names = list(inspect.signature(type(like).forward).parameters)[1:]
        self._streams = streams

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Streams:
        given = dict(zip(self._names, args, strict=False)) | kwargs
        return tuple(given[name] for name in self._streams)

    def hand_on(self, streams: Streams) -> Any:
        return streams if len(streams) > 1 else streams[0]


class _Tap(_Block):
    """Hands on what it gets, and keeps it in ``seen``."""

    seen: Streams = ()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.seen = self.read(args, kwargs)
        return self.hand_on(self.seen)


class _Residual(_Block):
    """Adds a residual to what it gets. A stream without one ends here: the model's last block drops it."""

    def __init__(self, like: nn.Module, streams: tuple[str, ...], rows: Sequence[Streams]) -> None:
        super().__init__(like, streams)
        self._residuals = list(zip(*rows, strict=True))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        pairs = zip(self.read(args, kwargs), self._residuals, strict=True)
        return self.hand_on(tuple(_added(x, residuals) for x, residuals in pairs))


def _added(x: torch.Tensor | None, residuals: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """What a request brings may be longer or shorter than the batch now: models pad lists of prompts at their end to
    the longest in the batch."""
    known = [residual for residual in residuals if residual is not None]
    return None if x is None or not known else x + torch.cat([fitted(residual, x.shape[1]) for residual in known])


def fitted(x: torch.Tensor, length: int) -> torch.Tensor:
    """[batch, tokens, channels], cut or padded with zeros to ``length`` tokens."""
    return x[:, :length] if x.shape[1] >= length else nn.functional.pad(x, (0, 0, 0, length - x.shape[1]))


class _Front(nn.Module):
    """Runs a block up to the Linear that makes the attention's queries, and leaves with its input."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self._block = [block]  # in a list, so that it is no submodule of this one
        self._queries = next(m for name, m in block.named_modules() if name.rpartition(".")[2] in QUERIES)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        def leave(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            raise _Reached(inputs[0])

        hook = self._queries.register_forward_pre_hook(leave)
        try:
            type(self._block[0]).forward(self._block[0], *args, **kwargs)
        finally:
            hook.remove()
        raise RuntimeError(f"the block {type(self._block[0]).__name__} ended without {', '.join(QUERIES)}")


def _difference(before: Streams, after: Streams) -> Streams:
    return tuple(None if x is None or y is None else y - x for x, y in zip(before, after, strict=True))
