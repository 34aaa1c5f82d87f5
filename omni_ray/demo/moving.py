"""Scenes of one plain shape that moves or stands still: their captions and the split into training and held-out.

A caption is ``a [small|large] COLOUR SHAPE [moving DIRECTION] [on a COLOUR background]``. Sizes and backgrounds that
are not said mean what they mean for pictures; a shape whose direction is not said stands still.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from itertools import product

from omni_ray.demo.scenes import COLOURS, ITEM, SHAPES, SIZES, Item, Scene, article, default_background, one_in

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""The unit step of each, x right and y down."""
HELD_OUT_ONE_IN = 10


@dataclass(frozen=True)
class MovingScene:
    """What each frame shows, a scene of one item, and the direction in which the item moves, if it does."""

    frame: Scene
    direction: str | None = None

    def caption(self) -> str:
        """The one canonical caption."""
        return caption(self, say_background=self.frame.background != default_background(self.frame.items))


def caption(scene: MovingScene, say_background: bool) -> str:
    """The caption, with the background said or left out."""
    text = scene.frame.items[0].words()
    if scene.direction is not None:
        text += f" moving {scene.direction}"
    if say_background:
        text += f" on {article(scene.frame.background)} {scene.frame.background} background"
    return text


_CAPTION = re.compile(
    rf"{ITEM}(?: moving ({'|'.join(DIRECTIONS)}))?(?: on an? ({'|'.join(COLOURS)}) background)?",
)


def parse_moving(text: str) -> MovingScene:
    """The scene that a caption names.

    Raises:
        ValueError: the text is not a caption of this grammar.
    """
    found = _CAPTION.fullmatch(" ".join(text.lower().strip(" .!").split()))
    if found is None:
        raise ValueError(f"not a caption of the moving demo grammar: {text!r}")
    size, colour, shape, direction, background = found.groups()
    items = (Item(shape, colour, size or "medium"),)
    return MovingScene(Scene(items, None, background or default_background(items)), direction)


def held_out(scene: MovingScene) -> bool:
    """Whether the scene is kept from training: one in 10, by a hash of its caption."""
    return one_in(scene.caption(), HELD_OUT_ONE_IN)


def every_scene(held: bool) -> list[MovingScene]:
    """All scenes of the training split, or of the held-out one; no shape has the background's colour."""
    found = [
        MovingScene(Scene((Item(shape, colour, size),), None, background), direction)
        for shape, colour, size, background, direction in product(SHAPES, COLOURS, SIZES, COLOURS, (None, *DIRECTIONS))
        if colour != background
    ]
    return [scene for scene in found if held_out(scene) == held]


def held_out_scenes(count: int, seed: int = 2024) -> list[MovingScene]:
    """``count`` different held-out scenes, the same at every call. ValueError where there are fewer."""
    found = every_scene(held=True)
    if count > len(found):
        raise ValueError(f"{count} held-out scenes were asked for, and there are {len(found)}")
    random.Random(seed).shuffle(found)
    return found[:count]
