"""How much of something there is a second, of late."""

from __future__ import annotations

import math
import time

WINDOW_S = 60.0
"""What was longer ago than this counts for little."""


class Rate:
    """The amounts that were added, per second, weighted by ``exp(-age / WINDOW_S)``."""

    def __init__(self) -> None:
        self._value = 0.0
        self._at = time.monotonic()

    def add(self, amount: float) -> None:
        self._value, self._at = self.now() + amount / WINDOW_S, time.monotonic()

    def now(self) -> float:
        return self._value * math.exp((self._at - time.monotonic()) / WINDOW_S)
