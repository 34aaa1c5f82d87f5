"""Draws scenes. One formula of signed distances serves numpy here and torch in training.

A polygon is a set of half planes ``n . p <= d R``: a convex one is where all hold, the five-pointed star where at
least four of its five hold, so its signed distance is the second largest instead of the largest.
"""

from __future__ import annotations

import math
import random
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from omni_ray.demo.scenes import COLOURS, SHAPES, SIZES, Scene

Array = npt.NDArray[Any]

SIDE = 256  # pixels
RADII = {"small": 22.0, "medium": 31.0, "large": 44.0}  # pixels
PAIR_OFFSET = 64.0  # pixels from the centre to each shape of a pair
ABSENT = -8.0  # the radius of a missing second shape: it covers nothing
PALETTE: Array = np.array(list(COLOURS.values()), dtype=np.float32)  # [colours, 3], 0..255


def _halfplanes() -> Array:
    """[shapes, 5, 3]: unit normal (x right, y down) and offset d in radii; short lists repeat their last row."""

    def rows(angles: list[float], d: float) -> list[list[float]]:
        full = [[math.cos(math.radians(a)), math.sin(math.radians(a)), d] for a in angles]
        return (full + full[-1:] * 5)[:5]

    wide, high = 0.95, 1.3
    tilt = math.degrees(math.atan2(wide, high))
    table = {
        "circle": rows([0], 0.0),
        "square": rows([0, 90, 180, 270], math.sqrt(math.pi) / 2),
        "triangle": rows([90, -30, 210], 0.65),
        "diamond": rows([tilt, 180 - tilt, 180 + tilt, -tilt], wide * high / math.hypot(wide, high)),
        "star": rows([-90 + 72 * k for k in range(5)], 1.3 * math.cos(math.radians(72))),
    }
    return np.array([table[name] for name in SHAPES], dtype=np.float32)


HALFPLANES: Array = _halfplanes()
CIRCLE, STAR = SHAPES.index("circle"), SHAPES.index("star")


def coverage(xp: ModuleType, dx: Any, dy: Any, shape: Any, radius: Any, table: Any) -> Any:
    """How much of each pixel a shape covers, 0..1, antialiased over one pixel.

    Args:
        xp: ``numpy`` or ``torch``.
        dx: [n, 1, width] pixels right of the shape's centre.
        dy: [n, height, 1] pixels below it.
        shape: [n] index into ``SHAPES``.
        radius: [n, 1, 1] pixels.
        table: ``HALFPLANES`` as an array of ``xp``.

    Returns:
        [n, height, width].
    """
    planes = table[shape][:, :, :, None, None]  # [n, 5, 3, 1, 1]
    first = planes[:, 0, 0] * dx + planes[:, 0, 1] * dy - planes[:, 0, 2] * radius
    second = first - 1e4
    for i in range(1, 5):
        plane = planes[:, i, 0] * dx + planes[:, i, 1] * dy - planes[:, i, 2] * radius
        second = xp.maximum(second, xp.minimum(first, plane))
        first = xp.maximum(first, plane)
    kind = shape[:, None, None]
    straight = xp.where(kind == STAR, second, first)
    distance = xp.where(kind == CIRCLE, xp.sqrt(dx * dx + dy * dy) - radius, straight)
    return xp.clip(0.5 - distance, 0.0, 1.0)


def paint(xp: ModuleType, plan: Any, colours: Any, background: Any, table: Any) -> Any:
    """Draws a batch.

    Args:
        xp: ``numpy`` or ``torch``.
        plan: [n, 2, 4] float: shape index, centre x, centre y, radius (pixels).
        colours: [n, 2, 3] in any unit; the picture has the same.
        background: [n, 3] in that unit.
        table: ``HALFPLANES`` as an array of ``xp``.

    Returns:
        [n, 3, SIDE, SIDE].
    """
    axis = xp.arange(SIDE) + 0.5
    if hasattr(plan, "device") and xp is not np:
        axis = axis.to(plan.device)
    picture = background[:, :, None, None] + xp.zeros_like(axis)[None, None, None, :] + xp.zeros_like(axis)[:, None]
    for i in range(2):
        column = plan[:, i, :, None, None]
        shape = plan[:, i, 0].astype(np.int64) if xp is np else plan[:, i, 0].long()
        share = coverage(xp, axis - column[:, 1], axis[:, None] - column[:, 2], shape, column[:, 3], table)
        picture = picture + share[:, None] * (colours[:, i, :, None, None] - picture)
    return picture


def place(scene: Scene, rng: random.Random) -> Array:
    """Where the shapes go: [2, 4] float of shape index, centre x, centre y, radius in pixels, with random jitter."""
    centre = SIDE / 2
    plan = np.array([[0, centre, centre, ABSENT]] * 2, dtype=np.float32)
    if scene.relation is None:
        spots = [(rng.uniform(-20, 20), rng.uniform(-20, 20))]
    else:
        sign = -1.0 if scene.relation in ("left of", "above") else 1.0
        along = [sign * PAIR_OFFSET + rng.uniform(-3, 3), -sign * PAIR_OFFSET + rng.uniform(-3, 3)]
        across = [rng.uniform(-10, 10), rng.uniform(-10, 10)]
        flat = scene.relation in ("left of", "right of")
        spots = [(a, c) if flat else (c, a) for a, c in zip(along, across, strict=True)]
    for row, item, (x, y) in zip(plan, scene.items, spots, strict=False):
        row[:] = (SHAPES.index(item.shape), centre + x, centre + y, RADII[item.size])
    return plan


def colour_indices(scene: Scene) -> list[int]:
    """[3]: the palette rows of the first shape, the second (0 where there is none) and the background."""
    names = list(COLOURS)
    second = names.index(scene.items[1].colour) if scene.relation is not None else 0
    return [names.index(scene.items[0].colour), second, names.index(scene.background)]


def draw(scene: Scene, seed: int = 0) -> Image.Image:
    """The scene as a 256 x 256 RGB image, the shapes' jitter drawn from ``seed``."""
    plan = place(scene, random.Random(seed))[None]
    rows = PALETTE[colour_indices(scene)]
    picture = paint(np, plan, rows[None, :2], rows[None, 2], HALFPLANES)[0]
    return Image.fromarray(np.round(picture.transpose(1, 2, 0)).astype(np.uint8))


assert set(RADII) == set(SIZES)
