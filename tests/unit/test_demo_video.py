"""The moving scenes: captions, the split, the drawing, and that the checker confirms the truth and nothing else."""

from __future__ import annotations

import dataclasses
import io
import random
from itertools import product

import numpy as np
import pytest
from PIL import Image, ImageFilter

from omni_ray.demo import check_moving, draw, draw_moving, moving, scenes

HELD = moving.held_out_scenes(12)
WAYS = (None, *moving.DIRECTIONS)


def foul(image: Image.Image) -> Image.Image:
    """The frame blurred and through a JPEG of low quality."""
    buffer = io.BytesIO()
    image.filter(ImageFilter.GaussianBlur(0.7)).save(buffer, "JPEG", quality=70)
    return Image.open(buffer)


@pytest.mark.parametrize(
    "text", ["a red circle", "an orange star moving up", "a small green square moving left on a blue background"]
)
def test_a_caption_survives_parsing(text: str) -> None:
    assert moving.parse_moving(text).caption() == text
    assert moving.parse_moving(f" {text.upper()}. ") == moving.parse_moving(text)


@pytest.mark.parametrize(
    "text",
    [
        "a red circle moving",
        "a red circle moving away",
        "a red circle on a blue background moving",
        "a red circle left of a blue square",
        "a red moving left circle",
        "a red circle moving left moving right",
    ],
)
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a caption"):
        moving.parse_moving(text)


def test_the_split_is_fixed_and_both_parts_hold_every_word() -> None:
    train, held = moving.every_scene(held=False), moving.every_scene(held=True)
    assert 0.08 < len(held) / (len(held) + len(train)) < 0.12
    assert not set(train) & set(held)
    assert len({scene.caption() for scene in train + held}) == len(train) + len(held) == 5 * 9 * 3 * 8 * 5
    for part in (train, held):
        words = {word for scene in part for word in scene.caption().split()}
        assert words >= {*scenes.COLOURS, *scenes.SHAPES, "small", "large", *moving.DIRECTIONS}
    assert moving.held_out_scenes(12) == HELD
    with pytest.raises(ValueError, match="9999 held-out"):
        moving.held_out_scenes(9999)


@pytest.mark.parametrize("direction", WAYS)
@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_the_checker_confirms_every_shape_and_direction_and_rejects_the_others(
    shape: str, direction: str | None
) -> None:
    scene = moving.MovingScene(scenes.Scene((scenes.Item(shape, "red", "medium"),), None, "white"), direction)
    clip = draw_moving.draw_clip(scene, seed=3)
    assert check_moving.reasons(clip, scene) == {}
    assert check_moving.reasons([foul(frame) for frame in clip], scene) == {}
    seen = check_moving.read(clip)
    for other in set(WAYS) - {direction}:
        assert set(check_moving.differences(seen, dataclasses.replace(scene, direction=other))) == {"direction"}
    for other in set(scenes.SHAPES) - {shape}:
        item = scenes.Item(other, "red", "medium")
        wrong = check_moving.differences(seen, moving.MovingScene(scenes.Scene((item,), None, "white"), direction))
        assert set(wrong) == {"shape"}


@pytest.mark.parametrize("colour", scenes.COLOURS)
def test_the_checker_tells_every_colour_and_size(colour: str) -> None:
    behind = "white" if colour != "white" else "blue"
    for size, found in product(scenes.SIZES, ("red", "green", colour)):
        item, drawn = scenes.Item("star", colour, size), scenes.Item("star", found, size)
        clip = draw_moving.draw_clip(moving.MovingScene(scenes.Scene((drawn,), None, behind), "up"))
        wrong = check_moving.reasons(clip, moving.MovingScene(scenes.Scene((item,), None, behind), "up"))
        assert set(wrong) == ({"colour"} if found != colour else set())
    other = moving.MovingScene(scenes.Scene((scenes.Item("star", colour, "small"),), None, "purple"), "up")
    assert {"size", "background"} <= set(check_moving.reasons(clip, other))


@pytest.mark.parametrize("scene", HELD, ids=lambda scene: scene.caption())
def test_the_checker_confirms_held_out_scenes_wherever_they_start(scene: moving.MovingScene) -> None:
    for seed in range(3):
        assert check_moving.reasons(draw_moving.draw_clip(scene, seed), scene) == {}


def test_a_way_that_turns_back_or_a_frame_without_the_shape_is_wrong() -> None:
    scene = moving.parse_moving("a red circle moving right")
    clip = draw_moving.draw_clip(scene)
    assert "direction" in check_moving.reasons([*clip[8:], *clip[:9]], scene)
    assert "direction" in check_moving.reasons([*clip[:9], *clip[:8][::-1]], moving.parse_moving("a red circle"))
    blank = Image.new("RGB", clip[0].size, "white")
    assert "count" in check_moving.reasons([*clip[:8], blank, *clip[9:]], scene)


def test_no_shape_leaves_the_frame() -> None:
    corners = np.array(list(product((0, 1), repeat=3)), dtype=np.float32)
    for name, direction in product(scenes.SHAPES, WAYS):
        scene = moving.MovingScene(scenes.Scene((scenes.Item(name, "black", "large"),), None, "white"), direction)
        forms = np.array([draw_moving.form(scene)] * len(corners), dtype=np.float32)
        colours = np.array([[[1.0] * 3, [0.0] * 3]] * len(corners), dtype=np.float32)
        clips = draw_moving.paint(np, forms, corners, colours, draw.HALFPLANES)
        for rim in (clips[..., 0, :], clips[..., -1, :], clips[..., 0], clips[..., -1]):
            assert rim.max() == 0


def test_torch_draws_the_same() -> None:
    torch = pytest.importorskip("torch")
    rng = random.Random(1)
    forms = np.array([draw_moving.form(scene) for scene in HELD[:4]], dtype=np.float32)
    jitter = np.array([[rng.random() for _ in range(3)] for _ in range(4)], dtype=np.float32)
    colours = np.stack([draw.PALETTE[draw_moving.colour_indices(scene)] for scene in HELD[:4]])
    ours = draw_moving.paint(np, forms, jitter, colours, draw.HALFPLANES)
    assert ours.shape == (4, 3, draw_moving.FRAMES, draw_moving.SIDE, draw_moving.SIDE)
    theirs = draw_moving.paint(torch, *map(torch.from_numpy, (forms, jitter, colours, draw.HALFPLANES)))
    assert np.abs(ours - theirs.numpy()).max() < 0.01
