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

import torch

from omni_ray.accel.offload import Transfers
from omni_ray.engine.gate import Call

MAX_IN_FLIGHT = 2
SMOOTHING = 0.3


@dataclass
class _Pending:
    calls: list[Call]
    start: torch.cuda.Event
    end: torch.cuda.Event
    transfers: Transfers | None = None


class DeviceClock:
    """Charges each lane its share, by tokens, of the device seconds of the forwards that it took part in.

    ``take_transfers`` gives what was copied to the device for the forward that has just been queued.
    """

    def __init__(self, device: torch.device, take_transfers: Callable[[], Transfers] | None = None) -> None:
        self._cuda = device.type == "cuda"
        self._take_transfers: Callable[[], Transfers | None] = take_transfers or (lambda: None)
        self._lock = threading.Lock()
        self._pending: deque[_Pending] = deque()
        self._seconds_per_token: dict[str, float] = {}

    def seconds_per_token(self, name: str) -> float:
        """Smoothed device seconds that one token costs in module ``name``; 0 before it was ever measured."""
        return self._seconds_per_token.get(name, 0.0)

    def busy(self) -> bool:
        """Whether the device still computes a forward. Charges for those that have ended; any thread may call it."""
        with self._lock:
            while self._pending and self._pending[0].end.query():
                self._read(self._pending.popleft())
            return bool(self._pending)

    @contextmanager
    def measure(self, calls: list[Call]) -> Iterator[None]:
        """Time what runs inside, and keep at most MAX_IN_FLIGHT forwards on the device."""
        if not self._cuda:
            start = time.perf_counter()
            yield
            self._charge(calls, time.perf_counter() - start, self._take_transfers())
            return
        while self.busy() and len(self._pending) >= MAX_IN_FLIGHT:
            self._pending[0].end.synchronize()
        torch.cuda.reset_peak_memory_stats()
        pending = _Pending(calls, torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        pending.start.record()
        yield
        pending.end.record()
        pending.transfers = self._take_transfers()
        peak = torch.cuda.max_memory_allocated()
        for call in calls:
            call.lane.peak_memory_bytes = max(call.lane.peak_memory_bytes, peak)
        self._pending.append(pending)

    def _read(self, pending: _Pending) -> None:
        self._charge(pending.calls, pending.start.elapsed_time(pending.end) / 1000, pending.transfers)

    def _charge(self, calls: list[Call], seconds: float, transfers: Transfers | None) -> None:
        tokens = sum(call.tokens for call in calls)
        hidden_s, paid_s = transfers.seconds() if transfers else (0.0, 0.0)
        for call in calls:
            share = call.tokens / tokens
            call.lane.device_s += seconds * share
            call.lane.offload_hidden_s += hidden_s * share
            call.lane.offload_paid_s += paid_s * share
        name, measured = calls[0].name, seconds / tokens
        before = self._seconds_per_token.get(name, measured)
        self._seconds_per_token[name] = before + SMOOTHING * (measured - before)
