"""How like two images are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from omni_ray.tuning.run import in_a_thread

MOST_DB = 99.0
"""What equal images count as in a mean."""


def psnr(first: Sequence[Any], second: Sequence[Any]) -> float:
    """dB of the mean error of all pixels of 8 bits; inf is bit for bit."""
    errors = [np.mean((a.astype(float) - b.astype(float)) ** 2) for a, b in zip(first, second, strict=True)]
    error = float(np.mean(errors))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def mean_psnr(first: Sequence[Any], second: Sequence[Any]) -> float:
    """The mean of the images' PSNR in dB."""
    return float(np.mean([min(psnr([a], [b]), MOST_DB) for a, b in zip(first, second, strict=True)]))


def ssim(first: Sequence[Any], second: Sequence[Any]) -> float:
    """Mean structural similarity of grey values (https://ieeexplore.ieee.org/document/1284395), flat 8 x 8 windows."""
    return float(in_a_thread(_ssim, first, second))


def _ssim(first: Sequence[Any], second: Sequence[Any]) -> float:
    x, y = (torch.from_numpy(np.stack(each)).float().mean(-1)[:, None] for each in (first, second))

    def mean(z: torch.Tensor) -> torch.Tensor:
        return functional.avg_pool2d(z, 8, stride=4)

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return float(((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())
