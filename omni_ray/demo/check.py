"""Reads a picture of plain shapes back: which shapes, colours, sizes and places, and whether a scene's words hold.

Distances between colours are Euclidean in RGB, 0..255. Tolerant of the blur and noise of a small autoencoder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from omni_ray.demo.draw import HALFPLANES, PALETTE, RADII, coverage
from omni_ray.demo.scenes import COLOURS, SHAPES, Scene

Array = npt.NDArray[Any]

COLOUR_TOLERANCE = 55.0  # RGB units from a palette colour
FOREGROUND = 60.0  # RGB units from the background
FRAME = 2  # pixels at the rim that no shape reaches and an autoencoder may stain
SPECK = 60  # pixels: a smaller blob is noise
MIN_OVERLAP = 0.75  # intersection over union with the ideal shape
UNIT_AREAS = {"circle": math.pi, "square": math.pi, "triangle": 2.1954, "diamond": 2.47, "star": 1.8972}


@dataclass(frozen=True)
class Blob:
    """One shape as read: names, centre (x right, y down) and area in pixels, and its fit to the ideal shape, 0..1."""

    shape: str
    colour: str
    size: str
    centre: tuple[float, float]
    area: int
    overlap: float


@dataclass(frozen=True)
class Reading:
    """What a picture shows; ``problem`` says why it cannot be read, else it is empty."""

    background: str
    blobs: tuple[Blob, ...]
    problem: str = ""


def _name(colour: Array) -> tuple[str, float]:
    """The nearest palette colour's name, and its distance."""
    distances = np.linalg.norm(PALETTE - colour, axis=1)
    index = int(distances.argmin())
    return list(COLOURS)[index], float(distances[index])


def _grow(mask: Array, seed: tuple[int, int]) -> Array:
    """The 4-connected part of ``mask`` [height, width] that holds ``seed``."""
    part = np.zeros_like(mask)
    part[seed] = True
    count = 0
    while count != (count := int(part.sum())):
        for _ in range(8):
            grown = part.copy()
            grown[1:] |= part[:-1]
            grown[:-1] |= part[1:]
            grown[:, 1:] |= part[:, :-1]
            grown[:, :-1] |= part[:, 1:]
            part = grown & mask
    return part


def _parts(mask: Array) -> list[Array]:
    """The connected parts of ``mask`` that are larger than a speck, largest first."""
    left = mask.copy()
    parts: list[Array] = []
    while len(parts) < 8 and left.any():
        row, column = np.unravel_index(int(left.argmax()), left.shape)
        part = _grow(left, (int(row), int(column)))
        left &= ~part
        if part.sum() >= SPECK:
            parts.append(part)
    return sorted(parts, key=lambda part: -int(part.sum()))


def _fit(mask: Array) -> tuple[str, float, float, tuple[float, float]]:
    """The best ideal shape for a blob: its name, overlap 0..1, radius and centre in pixels."""
    ys, xs = np.nonzero(mask)
    centre = (float(xs.mean()) + 0.5, float(ys.mean()) + 0.5)
    dx = (np.arange(mask.shape[1]) + 0.5 - centre[0])[None, None, :]
    dy = (np.arange(mask.shape[0]) + 0.5 - centre[1])[None, :, None]
    best = ("", -1.0, 0.0)
    for index, name in enumerate(SHAPES):
        radius = math.sqrt(len(xs) / UNIT_AREAS[name])
        ideal = coverage(np, dx, dy, np.array([index]), np.full((1, 1, 1), radius), HALFPLANES)[0] > 0.5
        overlap = float((ideal & mask).sum() / (ideal | mask).sum())
        best = max(best, (name, overlap, radius), key=lambda row: row[1])
    return (*best, centre)


def _blob(pixels: Array, part: Array, background: Array) -> tuple[Blob | None, str]:
    """Reads one part; or says why not."""
    distance = np.linalg.norm(pixels[part] - background, axis=1)
    core = pixels[part][distance >= np.median(distance) * 0.8]
    colour, off = _name(np.median(core, axis=0))
    if off > COLOUR_TOLERANCE:
        return None, f"a shape's colour is {off:.0f} RGB units from the nearest one, {colour}"
    axis = PALETTE[list(COLOURS).index(colour)] - background
    if not axis.any():
        return None, "a smear of the background's colour"
    mask = part & (((pixels - background) @ axis) / (axis @ axis) > 0.5)
    if mask.sum() < SPECK:
        return None, "a speck"
    shape, overlap, radius, centre = _fit(mask)
    if overlap < MIN_OVERLAP:
        return None, f"a {colour} blob is no clear shape (nearest {shape}, overlap {overlap:.2f})"
    size = min(RADII, key=lambda name: abs(math.log(RADII[name] / radius)))
    return Blob(shape, colour, size, centre, int(mask.sum()), overlap), ""


def read(image: Image.Image) -> Reading:
    """What the picture shows."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    frame = np.concatenate([pixels[:3].reshape(-1, 3), pixels[-3:].reshape(-1, 3), pixels[:, :3].reshape(-1, 3)])
    name, off = _name(np.median(frame, axis=0))
    if off > COLOUR_TOLERANCE:
        return Reading(name, (), f"the background is {off:.0f} RGB units from the nearest colour, {name}")
    background = np.median(frame, axis=0)
    blobs: list[Blob] = []
    mask = np.linalg.norm(pixels - background, axis=2) > FOREGROUND
    inside = np.pad(mask[FRAME:-FRAME, FRAME:-FRAME], FRAME)
    for part in _parts(inside):
        blob, problem = _blob(pixels, part, background)
        if blob is None:
            return Reading(name, tuple(blobs), problem)
        blobs.append(blob)
    return Reading(name, tuple(blobs))


def _related(first: Blob, second: Blob, relation: str) -> bool:
    dx, dy = second.centre[0] - first.centre[0], second.centre[1] - first.centre[1]
    along = dx if relation in ("left of", "right of") else dy
    across = dy if relation in ("left of", "right of") else dx
    forward = along if relation in ("left of", "above") else -along
    return forward > 40 and abs(across) < forward / 2


def reasons(image: Image.Image, scene: Scene) -> dict[str, str]:
    """What is wrong, by category (``unreadable``, ``count``, ``background``, ``shape``, ``colour``, ``size``,
    ``relation``), each with one sentence; empty where the picture shows the scene.
    """
    return differences(read(image), scene)


def differences(seen: Reading, scene: Scene) -> dict[str, str]:
    """What is wrong with what was read; see ``reasons``."""
    if seen.problem:
        return {"unreadable": seen.problem}
    if len(seen.blobs) != len(scene.items):
        return {"count": f"{len(seen.blobs)} shapes, not {len(scene.items)}"}
    orders = [seen.blobs] if len(seen.blobs) == 1 else [seen.blobs, seen.blobs[::-1]]
    wrong = min((_compare(order, scene) for order in orders), key=len)
    if seen.background != scene.background:
        wrong["background"] = f"{seen.background}, not {scene.background}"
    return wrong


def _compare(blobs: tuple[Blob, ...], scene: Scene) -> dict[str, str]:
    wrong = {}
    for blob, item in zip(blobs, scene.items, strict=True):
        for field in ("shape", "colour", "size"):
            got, wanted = getattr(blob, field), getattr(item, field)
            if got != wanted:
                wrong[field] = f"{got}, not {wanted}"
    if scene.relation is not None and not _related(blobs[0], blobs[1], scene.relation):
        wrong["relation"] = f"the first shape is not {scene.relation} the second"
    return wrong


def matches(image: Image.Image, scene: Scene) -> bool:
    """Whether the picture shows exactly the scene: every shape, colour, size, the relation and the background."""
    return not reasons(image, scene)
