"""Draws moving scenes: one formula of paths serves numpy here and torch in training.

A shape goes at an even speed along a straight line through the middle; where it starts and how far it goes vary.
"""

from __future__ import annotations

import random
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from omni_ray.demo import draw
from omni_ray.demo.draw import HALFPLANES, PALETTE, RADII, Array
from omni_ray.demo.moving import DIRECTIONS, MovingScene
from omni_ray.demo.scenes import COLOURS, SHAPES

SIDE = 128  # pixels
FRAMES = 17
TRAVEL = (40.0, 55.0)  # pixels from the first frame to the last
ALONG, ACROSS = 4.0, 12.0  # pixels that the path's middle is off the centre at most, along the direction and across it
SCALE = SIDE / draw.SIDE


def form(scene: MovingScene) -> list[float]:
    """[4]: the shape's index, its radius in pixels, and its direction x and y, both 0 where it stands still."""
    item = scene.frame.items[0]
    step = DIRECTIONS[scene.direction] if scene.direction is not None else (0, 0)
    return [SHAPES.index(item.shape), RADII[item.size] * SCALE, *step]


def colour_indices(scene: MovingScene) -> list[int]:
    """[2]: the palette rows of the shape and of the background."""
    names = list(COLOURS)
    return [names.index(scene.frame.items[0].colour), names.index(scene.frame.background)]


def paths(xp: ModuleType, forms: Any, jitter: Any, frames: Any) -> Any:
    """Where each shape is in each frame.

    Args:
        xp: ``numpy`` or ``torch``.
        forms: [n, 4] rows of ``form``.
        jitter: [n, 3] in 0..1: how far it goes, and how far the path's middle is off the centre, x and y.
        frames: [f] in -0.5..0.5: the first frame's time to the last one's.

    Returns:
        [n, f, 2] pixels, x and y of the shape's centre.
    """
    step = forms[:, None, 2:]
    room = ACROSS - (ACROSS - ALONG) * xp.abs(step)
    middle = SIDE / 2 + (2 * jitter[:, None, 1:] - 1) * room
    travel = TRAVEL[0] + (TRAVEL[1] - TRAVEL[0]) * jitter[:, None, :1]
    return middle + step * travel * frames[None, :, None]


def paint(xp: ModuleType, forms: Any, jitter: Any, colours: Any, table: Any) -> Any:
    """Draws a batch of clips.

    Args:
        xp: ``numpy`` or ``torch``.
        forms: [n, 4] float32 rows of ``form``.
        jitter: [n, 3] float32 in 0..1, as ``paths`` takes it.
        colours: [n, 2, 3] of the shape and the background, in any unit; the clip has the same.
        table: ``HALFPLANES`` as an array of ``xp``.

    Returns:
        [n, 3, FRAMES, SIDE, SIDE].
    """
    where = {} if xp is np else {"device": forms.device}
    axis, times = xp.arange(SIDE, **where) + 0.5, xp.arange(FRAMES, **where) / (FRAMES - 1) - 0.5
    centres = paths(xp, forms, jitter, times).reshape(-1, 2)
    rows = xp.arange(len(centres), **where) // FRAMES
    column = forms[rows, 1, None, None]
    shape = forms[rows, 0].astype(np.int64) if xp is np else forms[rows, 0].long()
    dx, dy = axis - centres[:, 0, None, None], axis[:, None] - centres[:, 1, None, None]
    share = draw.coverage(xp, dx, dy, shape, column, table).reshape(len(forms), 1, FRAMES, SIDE, SIDE)
    front, behind = colours[:, 0, :, None, None, None], colours[:, 1, :, None, None, None]
    return behind + share * (front - behind)


def draw_clip(scene: MovingScene, seed: int = 0) -> list[Image.Image]:
    """The scene as 17 RGB frames of 128 x 128, the path's jitter drawn from ``seed``."""
    rng = random.Random(seed)
    jitter: Array = np.array([[rng.random() for _ in range(3)]], dtype=np.float32)
    forms = np.array([form(scene)], dtype=np.float32)
    clip = paint(np, forms, jitter, PALETTE[colour_indices(scene)][None], HALFPLANES)[0]
    frames = np.round(clip.transpose(1, 2, 3, 0)).clip(0, 255).astype(np.uint8)
    return [Image.fromarray(frame) for frame in frames]
