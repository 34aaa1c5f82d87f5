"""A wall-clock budget, and the learning rate that follows it."""

from __future__ import annotations

import time


class Budget:
    """``seconds`` from now; ``fraction()`` runs from 0 to 1 over them."""

    def __init__(self, seconds: float) -> None:
        self.start, self.seconds = time.monotonic(), max(seconds, 1e-3)

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def left(self) -> float:
        """Seconds left, negative once it is over."""
        return self.seconds - self.elapsed()

    def fraction(self) -> float:
        """0 at the start, 1 at the end and after."""
        return min(1.0, self.elapsed() / self.seconds)


def learning_rate(peak: float, fraction: float, step: int, warmup_steps: int = 200, flat: float = 0.3) -> float:
    """A linear warm-up in steps, flat until ``flat`` of the budget, then linear down to one hundredth of the peak."""
    warm = min(1.0, (step + 1) / warmup_steps)
    down = min(1.0, (1.0 - fraction) / (1.0 - flat))
    return peak * warm * max(0.01, down)
