"""Whether a transformer waits for the host: whether its kernels take longer to launch than to run."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

MARGIN = 1.25
"""A forward that takes up to so many times as long as its kernels take to launch is taken to wait for the host."""

MAX_SHAPES = 1024
"""So many shapes are remembered."""


class Event(Protocol):
    """A mark in the device's queue, such as `torch.cuda.Event`."""

    def record(self) -> Any: ...
    def query(self) -> bool: ...
    def elapsed_time(self, end: Any) -> float: ...


class Launches:
    """The times of the shapes that a transformer has run in, by which a recording is worth its while or not.

    While kernels are recorded none of them runs, so the seconds of a recording are the host's own; shapes differ little
    in that, as they have the same kernels. A forward's seconds are the device's, or the host's where those are more.
    """

    def __init__(self, event: Callable[[], Event]) -> None:
        self._event = event
        self._host_s: float | None = None
        self._forward_s: OrderedDict[Hashable, float] = OrderedDict()
        self._running: deque[tuple[Hashable, Event, Event]] = deque()

    def recorded(self, seconds: float) -> None:
        """The host took so long to launch one forward."""
        self._host_s = seconds

    @contextmanager
    def forward(self, shape: Hashable) -> Iterator[None]:
        """Time a forward that is launched. The first one of a shape may be compiled too: the least time counts."""
        self._forward_s.setdefault(shape, math.inf)
        self._forward_s.move_to_end(shape)
        if len(self._forward_s) > MAX_SHAPES:
            self._forward_s.popitem(last=False)
        self._see_what_ended()
        start, end = self._event(), self._event()
        start.record()
        yield
        end.record()
        self._running.append((shape, start, end))

    def have_seen(self, shape: Hashable) -> bool:
        return shape in self._forward_s

    def keep_waiting(self, shape: Hashable) -> bool:
        """Whether forwards of ``shape`` wait for the host, as far as is known: of none that has not ended."""
        self._see_what_ended()
        return self._host_s is not None and self._forward_s.get(shape, math.inf) <= MARGIN * self._host_s

    def _see_what_ended(self) -> None:
        while self._running and self._running[0][2].query():
            ended, start, end = self._running.popleft()
            if ended in self._forward_s:
                self._forward_s[ended] = min(self._forward_s[ended], start.elapsed_time(end) / 1000)

    @property
    def are_known(self) -> bool:
        """Whether the host's time is."""
        return self._host_s is not None

    def forget(self, *shapes: Hashable) -> None:
        for shape in shapes:
            self._forward_s.pop(shape, None)
