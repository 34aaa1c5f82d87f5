"""When requests arrive: all at once, or at random with a mean rate."""

from __future__ import annotations

import math

import numpy as np


def arrival_times(num: int, rate: float, burstiness: float = 1.0, seed: int = 0) -> list[float]:
    """``num`` rising times in seconds, of ``rate`` requests per second; an infinite rate is a burst at 0.

    The gaps are gamma-distributed with shape ``burstiness`` and mean 1 / rate: 1 is a Poisson process, less comes in
    clumps, more comes evenly.
    """
    if not rate > 0 or not burstiness > 0 or math.isinf(burstiness):
        raise ValueError(f"rate {rate:g} and burstiness {burstiness:g} have to be above 0, the burstiness finite")
    gaps = np.random.default_rng(seed).gamma(burstiness, 1 / (rate * burstiness), num)
    return [float(time) for time in np.cumsum(gaps)]
