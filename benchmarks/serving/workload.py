"""Requests of a dataset, made at random from a seed."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.serving.request import Kind, Request

WORDS = ("red", "blue", "circle", "square", "left", "above", "large")
COLOURS = ("red", "green", "blue", "yellow", "purple")
SHAPES = ("circle", "square", "triangle")

Mix = Sequence[tuple[str, int, float]]
"""Size ("WxH"), denoise steps (0 leaves them to the server), weight."""

IMAGE_MIX: Mix = (
    ("512x512", 20, 0.15),
    ("768x768", 20, 0.25),
    ("1024x1024", 25, 0.45),
    ("1536x1536", 35, 0.15),
)


def image_mix(sizes: Sequence[str], steps: Sequence[int]) -> Mix:
    """IMAGE_MIX, or ``sizes`` in equal parts; ``steps`` are one number for all sizes or one for each.

    Raises:
        ValueError: the numbers of sizes and steps do not match.
    """
    mix = [(size, 0, 1.0) for size in sizes] or list(IMAGE_MIX)
    if not steps:
        return mix
    if len(steps) not in (1, len(mix)):
        raise ValueError(f"--steps has {len(steps)} numbers for {len(mix)} sizes; give 1 or {len(mix)}")
    return [(size, steps[i % len(steps)], weight) for i, (size, _, weight) in enumerate(mix)]


@dataclass(frozen=True)
class Shapes:
    """What the requests of each kind ask for. Lengths of prompts are in words, those of answers in tokens."""

    input_len: int = 64
    output_len: int = 128
    stream: bool = True
    ignore_eos: bool = True
    images: Mix = IMAGE_MIX
    progress: bool = False
    video: Mapping[str, Any] | None = None


def make_requests(
    num: int, weights: Mapping[Kind, float], models: Mapping[Kind, str], shapes: Shapes, seed: int = 0
) -> list[Request]:
    """``num`` requests whose kinds are drawn by ``weights``. Prompts differ, so that no prefix cache answers."""
    dice = random.Random(seed)
    kinds = dice.choices(list(weights), list(weights.values()), k=num)
    makers = {"chat": _chat, "images": _image, "videos": _video}
    return [Request(kind, {"model": models[kind]} | makers[kind](shapes, dice)) for kind in kinds]


def _chat(shapes: Shapes, dice: random.Random) -> dict[str, Any]:
    prompt = " ".join(dice.choices(WORDS, k=shapes.input_len))
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": shapes.output_len, "temperature": 0.0}
    if shapes.ignore_eos:
        body["ignore_eos"] = True
    return body | ({"stream": True, "stream_options": {"include_usage": True}} if shapes.stream else {})


def _image(shapes: Shapes, dice: random.Random) -> dict[str, Any]:
    size, steps, _ = dice.choices(shapes.images, [weight for *_, weight in shapes.images])[0]
    body = {"prompt": _scene(dice), "size": size, "seed": dice.randrange(2**31)}
    body |= {"num_inference_steps": steps} if steps else {}
    return body | ({"stream": True, "progress": True} if shapes.progress else {})


def _video(shapes: Shapes, dice: random.Random) -> dict[str, Any]:
    return {"prompt": _scene(dice), "seed": dice.randrange(2**31), **(shapes.video or {})}


def _scene(dice: random.Random) -> str:
    return f"a {dice.choice(COLOURS)} {dice.choice(SHAPES)}"
