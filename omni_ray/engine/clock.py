"""Device time: whose forward took how long, and whether the device is busy.

On a GPU a forward is only queued when its Python call returns, so its time is read from events once they have passed.
The queue is kept short: a new forward waits until at most one other is unfinished, so that a cancelled lane, or a more
urgent one, never waits behind more than that.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from omni_ray.accel.offload import Transfers
from omni_ray.engine.gate import Call

if TYPE_CHECKING:
    from omni_ray.engine.lane import Lane

MAX_IN_FLIGHT = 2
SMOOTHING = 0.3

OnForward = Callable[[str, int, float, int], None]
"""Is told of each forward that has ended: the component, the number of calls that it answered, its device seconds, and
the most bytes that its GPU held meanwhile (0 on a CPU). It is called from any thread, one at a time."""


@dataclass
class _Pending:
    """A forward on the device: who is charged, and not their calls, which hold tensors."""

    name: str
    shares: list[tuple[Lane, int]]
    start: torch.cuda.Event
    end: torch.cuda.Event
    transfers: Transfers | None = None
    peak_bytes: int = 0

    def has_ended(self) -> bool:
        return bool(self.end.query()) and (self.transfers is None or self.transfers.have_ended())

    def wait(self) -> None:
        self.end.synchronize()
        if self.transfers is not None:
            self.transfers.wait()


class DeviceClock:
    """Charges each lane its share, by tokens, of the device seconds of the forwards that it took part in.

    ``take_transfers`` gives what was copied to the device for the forward that has just been queued.
    """

    def __init__(
        self,
        device: torch.device,
        take_transfers: Callable[[], Transfers] | None = None,
        on_forward: OnForward | None = None,
    ) -> None:
        self._cuda = device.type == "cuda"
        self._take_transfers: Callable[[], Transfers | None] = take_transfers or (lambda: None)
        self._on_forward = on_forward
        self._lock = threading.Lock()
        self._pending: deque[_Pending] = deque()
        self._seconds_per_token: dict[str, float] = {}

    def seconds_per_token(self, name: str) -> float:
        """Smoothed device seconds that one token costs in module ``name``; 0 before it was ever measured."""
        return self._seconds_per_token.get(name, 0.0)

    def busy(self) -> bool:
        """Whether the device still computes a forward. Charges for those that have ended; any thread may call it."""
        with self._lock:
            while self._pending and self._pending[0].has_ended():
                ended = self._pending.popleft()
                seconds = ended.start.elapsed_time(ended.end) / 1000
                self._charge(ended.name, ended.shares, seconds, ended.transfers, ended.peak_bytes)
            return bool(self._pending)

    @contextmanager
    def measure(self, calls: list[Call]) -> Iterator[None]:
        """Time what runs inside, and keep at most MAX_IN_FLIGHT forwards on the device."""
        name, shares = calls[0].name, [(call.lane, call.tokens) for call in calls]
        if not self._cuda:
            start = time.perf_counter()
            yield
            self._charge(name, shares, time.perf_counter() - start, self._take_transfers())
            return
        while self.busy() and (oldest := self._oldest()):
            oldest.wait()
        torch.cuda.reset_peak_memory_stats()
        pending = _Pending(name, shares, torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        pending.start.record()
        yield
        pending.end.record()
        pending.transfers = self._take_transfers()
        pending.peak_bytes = torch.cuda.max_memory_allocated()
        for lane, _ in shares:
            lane.peak_memory_bytes = max(lane.peak_memory_bytes, pending.peak_bytes)
        with self._lock:
            self._pending.append(pending)

    def _oldest(self) -> _Pending | None:
        """The forward that a new one has to wait for."""
        with self._lock:
            return self._pending[0] if len(self._pending) >= MAX_IN_FLIGHT else None

    def _charge(
        self,
        name: str,
        shares: list[tuple[Lane, int]],
        seconds: float,
        transfers: Transfers | None,
        peak_bytes: int = 0,
    ) -> None:
        tokens = sum(each for _, each in shares)
        hidden_s, paid_s = transfers.seconds() if transfers else (0.0, 0.0)
        for lane, each in shares:
            share = each / tokens
            lane.device_s += seconds * share
            lane.offload_hidden_s += hidden_s * share
            lane.offload_paid_s += paid_s * share
        measured = seconds / tokens
        before = self._seconds_per_token.get(name, measured)
        self._seconds_per_token[name] = before + SMOOTHING * (measured - before)
        if self._on_forward is not None:
            self._on_forward(name, len(shares), seconds, peak_bytes)
