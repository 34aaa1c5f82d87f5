"""Scenes of one or two plain shapes: their captions, their sampling and the split into training and held-out.

A caption is ``a [small|large] COLOUR SHAPE``, optionally ``RELATION a ... SHAPE``, optionally ``on a COLOUR
background``. An unsaid size is medium. An unsaid background is white, or black where a shape is white.
"""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass

SHAPES = ("circle", "square", "triangle", "diamond", "star")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 35, 35),
    "orange": (245, 140, 20),
    "yellow": (250, 225, 40),
    "green": (30, 150, 60),
    "blue": (35, 85, 215),
    "purple": (135, 45, 170),
    "pink": (250, 150, 195),
    "black": (15, 15, 15),
    "white": (255, 255, 255),
}
SIZES = ("small", "medium", "large")
RELATIONS = ("left of", "right of", "above", "below")
_MIRROR = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
HELD_OUT_ONE_IN = 20


@dataclass(frozen=True)
class Item:
    """One shape: its size, colour and form, each a name from the tables above."""

    shape: str
    colour: str
    size: str = "medium"

    def words(self) -> str:
        """The noun phrase, such as ``a large red circle``."""
        parts = [self.colour, self.shape] if self.size == "medium" else [self.size, self.colour, self.shape]
        return f"{article(parts[0])} {' '.join(parts)}"


@dataclass(frozen=True)
class Scene:
    """One item, or two with the relation of the first to the second; the background is a colour's name."""

    items: tuple[Item, ...]
    relation: str | None
    background: str

    def caption(self) -> str:
        """The one canonical caption of this scene."""
        return caption(self, say_background=self.background != default_background(self.items))


def article(word: str) -> str:
    """``an`` before a vowel, else ``a``."""
    return "an" if word[0] in "aeiou" else "a"


def default_background(items: tuple[Item, ...]) -> str:
    """What an unsaid background means: white, or black where a shape is white."""
    if all(item.colour != "white" for item in items):
        return "white"
    return "black" if all(item.colour != "black" for item in items) else "blue"


def caption(scene: Scene, say_background: bool) -> str:
    """The caption, with the background said or left out."""
    text = scene.items[0].words()
    if scene.relation is not None:
        text += f" {scene.relation} {scene.items[1].words()}"
    if say_background:
        text += f" on {article(scene.background)} {scene.background} background"
    return text


ITEM = rf"an? (?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_CAPTION = re.compile(
    rf"{ITEM}(?: ({'|'.join(RELATIONS)}) {ITEM})?(?: on an? ({'|'.join(COLOURS)}) background)?",
)


def parse(text: str) -> Scene:
    """The scene that a caption names.

    Raises:
        ValueError: the text is not a caption of this grammar.
    """
    found = _CAPTION.fullmatch(" ".join(text.lower().strip(" .!").split()))
    if found is None:
        raise ValueError(f"not a caption of the demo grammar: {text!r}")
    size, colour, shape, relation, size_2, colour_2, shape_2, background = found.groups()
    items: tuple[Item, ...] = (Item(shape, colour, size or "medium"),)
    if relation is not None:
        items += (Item(shape_2, colour_2, size_2 or "medium"),)
    return Scene(items, relation, background or default_background(items))


def held_out(scene: Scene) -> bool:
    """Whether the scene is kept from training: one in 20, by a hash that a mirrored relation does not change."""
    if scene.relation in ("right of", "below"):
        scene = Scene(scene.items[::-1], _MIRROR[scene.relation], scene.background)
    return one_in(scene.caption(), HELD_OUT_ONE_IN)


def one_in(text: str, n: int) -> bool:
    """A fixed pseudo-random choice of one text in ``n`` (SHA-1, so the same on every machine)."""
    return int.from_bytes(hashlib.sha1(text.encode(), usedforsecurity=False).digest()[:8], "big") % n == 0


def _sample_item(rng: random.Random) -> Item:
    return Item(rng.choice(SHAPES), rng.choice(_COLOUR_NAMES), rng.choice(SIZES))


_COLOUR_NAMES = tuple(COLOURS)


def sample_any(rng: random.Random, pair_share: float = 0.7, default_share: float = 0.35) -> Scene:
    """A random scene of either split; no shape has the background's colour."""
    items: tuple[Item, ...] = (_sample_item(rng),)
    relation = None
    if rng.random() < pair_share:
        items += (_sample_item(rng),)
        relation = rng.choice(RELATIONS)
    used = {item.colour for item in items}
    free = [name for name in _COLOUR_NAMES if name not in used]
    background = default_background(items) if rng.random() < default_share else rng.choice(free)
    return Scene(items, relation, background)


def sample(rng: random.Random, held: bool = False) -> Scene:
    """A random scene of the training split, or of the held-out one."""
    while True:
        scene = sample_any(rng)
        if held_out(scene) == held:
            return scene


def held_out_scenes(count: int, seed: int = 2024) -> list[Scene]:
    """``count`` different held-out scenes, the same at every call."""
    rng = random.Random(seed)
    found: dict[Scene, None] = {}
    while len(found) < count:
        found[sample(rng, held=True)] = None
    return list(found)
