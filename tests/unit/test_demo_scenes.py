"""The demo scenes: captions, the split, the drawing, and that the checker confirms the truth and nothing else."""

from __future__ import annotations

import dataclasses
import io
import random

import numpy as np
import pytest
from PIL import Image, ImageFilter

from omni_ray import demo
from omni_ray.demo import check, draw, scenes

HELD = scenes.held_out_scenes(40)


def blurred(image: Image.Image) -> Image.Image:
    """The picture blurred and through a JPEG of low quality."""
    buffer = io.BytesIO()
    image.filter(ImageFilter.GaussianBlur(1.5)).save(buffer, "JPEG", quality=60)
    return Image.open(buffer)


def test_resolve_names_the_known_models() -> None:
    assert [demo.resolve(name).name for name in demo.NAMES] == ["chat", "image", "video"]
    with pytest.raises(ValueError, match="'audio'; the known ones are chat, image, video"):
        demo.resolve("audio")


@pytest.mark.parametrize(
    "text",
    [
        "a red circle",
        "an orange star on a blue background",
        "a small red circle left of a large blue square",
        "a white circle",
        "a white square above a black square",
    ],
)
def test_a_caption_survives_parsing(text: str) -> None:
    assert scenes.parse(text).caption() == text
    assert scenes.parse(f" {text.upper()}. ") == scenes.parse(text)


def test_defaults() -> None:
    assert scenes.parse("a red circle") == scenes.parse("a medium red circle on a white background")
    assert scenes.parse("a white circle").background == "black"


@pytest.mark.parametrize("text", ["", "a red dog", "a circle", "a red circle under a blue square"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a caption"):
        scenes.parse(text)


def test_the_split_is_fixed_and_keeps_mirrored_captions_together() -> None:
    rng = random.Random(0)
    found = [scenes.sample_any(rng) for _ in range(4000)]
    assert 0.03 < sum(map(scenes.held_out, found)) / len(found) < 0.07
    for scene in found[:500]:
        if scene.relation is not None:
            mirrored = scenes.Scene(scene.items[::-1], scenes._MIRROR[scene.relation], scene.background)
            assert scenes.held_out(scene) == scenes.held_out(mirrored)
    assert not any(scenes.held_out(scenes.sample(rng)) for _ in range(300))
    assert scenes.held_out_scenes(20) == HELD[:20]


@pytest.mark.parametrize("scene", HELD, ids=lambda scene: scene.caption())
def test_the_checker_confirms_the_truth(scene: scenes.Scene) -> None:
    picture = draw.draw(scene, seed=3)
    assert check.reasons(picture, scene) == {}
    assert check.reasons(blurred(picture), scene) == {}


@pytest.mark.parametrize("scene", HELD[:15], ids=lambda scene: scene.caption())
def test_the_checker_names_what_is_wrong(scene: scenes.Scene) -> None:
    picture, item = draw.draw(scene), scene.items[0]
    for field, names in (("shape", scenes.SHAPES), ("colour", tuple(scenes.COLOURS)), ("size", scenes.SIZES)):
        other = next(name for name in names if name != getattr(item, field))
        changed = dataclasses.replace(item, **{field: other})
        assert check.reasons(picture, dataclasses.replace(scene, items=(changed, *scene.items[1:])))
    other = next(name for name in scenes.COLOURS if name != scene.background)
    assert "background" in check.reasons(picture, dataclasses.replace(scene, background=other))
    if scene.relation is not None and scene.items[0] != scene.items[1]:
        mirrored = dataclasses.replace(scene, relation=scenes._MIRROR[scene.relation])
        assert check.reasons(picture, mirrored)


def test_the_checker_reports_a_missing_shape_and_a_foul_background() -> None:
    pair = scenes.parse("a red circle left of a blue square")
    assert "count" in check.reasons(draw.draw(scenes.parse("a red circle")), pair)
    assert "unreadable" in check.reasons(Image.new("RGB", (256, 256), (128, 128, 128)), pair)


def test_torch_draws_the_same() -> None:
    torch = pytest.importorskip("torch")
    plans = np.stack([draw.place(scene, random.Random(i)) for i, scene in enumerate(HELD[:8])])
    rows = np.stack([draw.PALETTE[draw.colour_indices(scene)] for scene in HELD[:8]])
    ours = draw.paint(np, plans, rows[:, :2], rows[:, 2], draw.HALFPLANES)
    tensors = [torch.from_numpy(a) for a in (plans, rows[:, :2].copy(), rows[:, 2].copy(), draw.HALFPLANES)]
    assert np.abs(ours - draw.paint(torch, *tensors).numpy()).max() < 0.01
