"""What `omni-ray calibrate` found out about a model, as the file that `cache.calibration` names."""

from __future__ import annotations

import json
import math
from pathlib import Path

from pydantic import Field, ValidationError

from omni_ray.config.block import Block, Positive
from omni_ray.errors import ConfigError


class Curve(Block):
    """From the distance of two steps' signals to the change of what the blocks add: a polynomial, highest power first.

    Outside of the distances that were seen it says what it says at their ends.
    """

    coefficients: tuple[float, ...]
    lowest: float = -math.inf
    highest: float = math.inf
    r2: float | None = None
    num_pairs: int = 0

    def __call__(self, distance: float) -> float:
        x, value = min(max(distance, self.lowest), self.highest), 0.0
        for coefficient in self.coefficients:
            value = value * x + coefficient
        return max(0.0, value)


class Expected(Block):
    """What a threshold gave on the prompts of the calibration: the share of steps skipped, as predicted from the run
    without a cache and as it then was, and the likeness to that run in dB."""

    threshold: float
    predicted: float
    skipped: float
    psnr: float


class Calibration(Block):
    """The curves of a model's transformers, and what to expect of thresholds."""

    source: str
    pipeline: str
    num_inference_steps: Positive
    max_consecutive_skips: Positive
    num_prompts: Positive
    curves: dict[str, Curve] = Field(min_length=1)
    expected: tuple[Expected, ...] = ()

    def threshold_for(self, psnr: float) -> float:
        """The highest threshold that kept ``psnr`` dB. Raises ConfigError where none did."""
        good = [each.threshold for each in self.expected if each.psnr >= psnr]
        if not good:
            best = max((each.psnr for each in self.expected), default=0.0)
            raise ConfigError(
                f"cache.quality: no threshold of the calibration kept {psnr:g} dB, the best {best:.1f}; lower psnr, or "
                "calibrate with lower --thresholds"
            )
        return max(good)


def read_calibration(path: str) -> Calibration:
    """The file at ``path``. Raises ConfigError where it is none."""
    try:
        return Calibration.model_validate(json.loads(Path(path).expanduser().read_text()))
    except OSError as error:
        raise ConfigError(
            f"cache.calibration: {path} cannot be read: {error.strerror}; make it by `omni-ray calibrate`"
        ) from error
    except (ValidationError, json.JSONDecodeError) as error:
        raise ConfigError(
            f"cache.calibration: {path} is no file of `omni-ray calibrate`: {str(error).splitlines()[0]}"
        ) from error
