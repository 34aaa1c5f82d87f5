"""Reads a clip of one moving shape back: whether its frames show the scene and the shape goes where the words say."""

from __future__ import annotations

import math

from PIL import Image

from omni_ray.demo import check, draw
from omni_ray.demo.moving import DIRECTIONS, MovingScene

MIN_TRAVEL = 50.0  # pixels of the 256 that ``check`` reads
MAX_DRIFT = 16.0  # pixels that a shape standing still may seem to move


def way(centres: list[tuple[float, float]]) -> str:
    """The direction of a way through two or more points, ``still``, or what else it is."""
    (x0, y0), (x1, y1) = centres[0], centres[-1]
    dx, dy = x1 - x0, y1 - y0
    if all(math.dist(point, centres[0]) <= MAX_DRIFT for point in centres):
        return "still"
    for name, (x, y) in DIRECTIONS.items():
        along = [px * x + py * y for px, py in centres]
        if along == sorted(along) and along[-1] - along[0] >= MIN_TRAVEL and abs(dx * y) + abs(dy * x) <= MAX_DRIFT:
            return name
    return f"{dx:.0f} pixels right and {dy:.0f} down"


def read(frames: list[Image.Image]) -> dict[int, check.Reading]:
    """What the first, the middle and the last frame show, by their index; in pixels of a 256 x 256 frame."""
    size = (draw.SIDE, draw.SIDE)
    return {
        index: check.read(frames[index].resize(size, Image.Resampling.BICUBIC))
        for index in (0, len(frames) // 2, len(frames) - 1)
    }


def differences(readings: dict[int, check.Reading], scene: MovingScene) -> dict[str, str]:
    """What is wrong with what was read; see ``reasons``."""
    wrong: dict[str, str] = {}
    for index, reading in readings.items():
        for kind, text in check.differences(reading, scene.frame).items():
            wrong.setdefault(kind, f"frame {index}: {text}")
    wanted = scene.direction or "still"
    if "unreadable" not in wrong and "count" not in wrong:
        seen = way([reading.blobs[0].centre for reading in readings.values()])
        if seen != wanted:
            wrong["direction"] = f"{seen}, not {wanted}"
    return wrong


def reasons(frames: list[Image.Image], scene: MovingScene) -> dict[str, str]:
    """What is wrong, by category (those of a picture, and ``direction``), each with one sentence; empty where the
    clip shows the scene. Three frames are read.
    """
    return differences(read(frames), scene)
