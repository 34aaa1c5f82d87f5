"""The stacks of blocks of a transformer, run in part: up to the first block's modulation, or with a residual in place
of all blocks.

A transformer runs its own forward each time, with its lists of blocks replaced: so what lies before and after the
blocks (embeddings, output norm and projection) is computed for the step at hand, whatever the model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from omni_ray.accel.cache.standins import Entry, Front, Reached, Residual, Streams, Tap

Replace = Callable[[str, Sequence[nn.Module]], Sequence[nn.Module]]
"""From the name of a stack and what stands there, what shall stand there."""


class Stacks:
    """The stacks of ``transformer``, in the order of its forward: their names, and the arguments of their blocks that
    are handed on from one to the next.

    Replaces the lists inside of the forward that the transformer has now; what wraps it later stays outside.
    """

    def __init__(self, transformer: Any, stacks: Mapping[str, tuple[str, ...]]) -> None:
        self._transformer = transformer
        self._entries = {name: Entry(getattr(transformer, name)[0], streams) for name, streams in stacks.items()}
        self._replace: Replace | None = None
        forward = transformer.forward

        @functools.wraps(forward)
        def replaced_forward(*args: Any, **kwargs: Any) -> Any:
            if self._replace is None:
                return forward(*args, **kwargs)
            with self._replaced(self._replace):
                return forward(*args, **kwargs)

        transformer.forward = replaced_forward

    def signal(self, run: Callable[[], Any]) -> torch.Tensor:
        """The modulated input of the first block's attention, [batch, tokens, channels], in the forward that ``run``
        starts, which goes no further. On a sequence axis: of this rank's tokens."""
        first, entry = next(iter(self._entries.items()))
        try:
            with self._replacing(lambda name, here: [Front(entry)] if name == first else here):
                run()
        except Reached as reached:
            return reached.signal
        raise RuntimeError(f"the forward of {type(self._transformer).__name__} did not come to {first}")

    def record(self, run: Callable[[], Any]) -> tuple[Any, list[Streams]]:
        """The answer of the forward that ``run`` starts, and what each stack added to its streams."""
        taps = {name: (Tap(entry, cut=True), Tap(entry, cut=False)) for name, entry in self._entries.items()}
        with self._taken_over(), self._replacing(lambda name, here: [taps[name][0], *here, taps[name][1]]):
            answer = run()
        return answer, [_difference(before.seen, after.seen) for before, after in taps.values()]

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Whatever stands in the stacks gets streams that are cut. Does nothing inside of the other methods."""
        if self._replace is not None:
            yield
            return
        with self._taken_over(), self._replacing(lambda name, here: [Tap(self._entries[name], cut=True), *here]):
            yield

    def reuse(self, run: Callable[[], Any], residuals: Sequence[Sequence[Streams]]) -> Any:
        """The answer of the forward that ``run`` starts, where the stacks compute nothing: each adds the residuals that
        the requests in the batch bring, one after the other."""
        rows = dict(zip(self._entries, residuals, strict=True))
        with self._replacing(lambda name, here: [Residual(self._entries[name], rows[name])]):
            return run()

    @contextmanager
    def _taken_over(self) -> Iterator[None]:
        with ExitStack() as stack:
            for entry in self._entries.values():
                stack.enter_context(entry.taken_over())
            yield

    @contextmanager
    def _replacing(self, replace: Replace) -> Iterator[None]:
        self._replace = replace
        try:
            yield
        finally:
            self._replace = None

    @contextmanager
    def _replaced(self, replace: Replace) -> Iterator[None]:
        modules = self._transformer._modules
        before = {name: modules[name] for name in self._entries}
        for name, here in before.items():
            modules[name] = nn.ModuleList(replace(name, list(here)))
        try:
            yield
        finally:
            modules.update(before)


def _difference(before: Streams, after: Streams) -> Streams:
    return tuple(None if x is None or y is None else y - x for x, y in zip(before, after, strict=True))
