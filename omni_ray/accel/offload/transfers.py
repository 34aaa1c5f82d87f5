"""Seconds that copies to the device take, and those that the device waits for them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

Span = tuple[torch.cuda.Event, torch.cuda.Event]


@dataclass
class Transfers:
    """What was copied for one forward. On a GPU the seconds are read from events, once those have passed."""

    copies: list[Span] = field(default_factory=list)
    waits: list[Span] = field(default_factory=list)
    host_s: float = 0.0
    num_bytes: int = 0

    def have_ended(self) -> bool:
        """Whether the seconds are known: a copy for the next forward may outlast this one."""
        return all(end.query() for _, end in (*self.copies, *self.waits))

    def wait(self) -> None:
        """Until they have ended."""
        for _, end in (*self.copies, *self.waits):
            end.synchronize()

    def seconds(self) -> tuple[float, float]:
        """Seconds of copying that computation hid, and those that it waited for."""
        copied, waited = _sum(self.copies) + self.host_s, _sum(self.waits) + self.host_s
        return max(0.0, copied - waited), waited


class Recorder:
    """Records the transfers of the forward at hand."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._now = Transfers()

    def take(self) -> Transfers:
        """What was recorded since the last call."""
        taken, self._now = self._now, Transfers()
        return taken

    @contextmanager
    def copy(self, num_bytes: int, *, hidden: bool) -> Iterator[None]:
        """Record a copy in the current stream; one that is not ``hidden`` in a stream of its own is waited for."""
        self._now.num_bytes += num_bytes
        if not self._cuda:
            start = time.perf_counter()
            yield
            self._now.host_s += time.perf_counter() - start
            return
        with _span() as span:
            yield
        self._now.copies.append(span)
        if not hidden:
            self._now.waits.append(span)

    @contextmanager
    def wait(self) -> Iterator[None]:
        """Record that the current stream waits for a copy in another."""
        if not self._cuda:
            yield
            return
        with _span() as span:
            yield
        self._now.waits.append(span)


@contextmanager
def _span() -> Iterator[Span]:
    span = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    span[0].record()
    yield span
    span[1].record()


def _sum(spans: list[Span]) -> float:
    milliseconds: float = sum(start.elapsed_time(end) for start, end in spans)
    return milliseconds / 1000
