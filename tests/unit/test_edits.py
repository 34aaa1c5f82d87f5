"""Drawing from an image, and inside a mask, with the modules of a model that draws from text."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from omni_ray.accel.edits import edit_pipelines
from omni_ray.config.spec import Batching
from omni_ray.engine.loop import EngineLoop
from omni_ray.engine.media import decode_mask
from omni_ray.messages import Job, Preview
from tests.lanes import run_lanes, usage
from tests.ranks import pixels

SD3_MASK = ("sd3", "mask")
EDITED = ("flux", "qwen_image", "sd3", "z_image")


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


PICTURE = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
MASK = Image.new("L", (64, 64))
MASK.paste(255, (16, 16, 48, 48))


def job_of(kind: str, **more: Any) -> Job:
    params = {"prompt": "a fox", "height": 64, "width": 64, "num_inference_steps": 5, "strength": 0.6}
    params |= {"output_type": "np"}
    mask = png(MASK) if kind == "mask" else None
    return Job(id="j", model="m", group="m", params=params, seed=5, images=(png(PICTURE),), mask=mask, **more)


# The tiny SD3 has fewer latent channels than its pipeline with a mask wants.
@pytest.mark.parametrize(("family", "kind"), [(f, k) for f in EDITED for k in ("image", "mask") if (f, k) != SD3_MASK])
def test_edits_equal_those_of_the_plain_pipeline(
    family: str, kind: str, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    edits = edit_pipelines(tiny(family))
    job = job_of(kind)
    loop = EngineLoop(tiny(family), Batching(max_num_batched_tokens=1), edits=edits)
    made, _ = run_lanes(loop, [job], monkeypatch)
    inputs = {"image": PICTURE} | ({"mask_image": MASK} if kind == "mask" else {})
    wanted: Any = edits[kind]
    wanted = pixels(wanted(**job.params, **inputs, generator=torch.Generator("cpu").manual_seed(5)))
    assert (made["j"] == wanted).all()


@pytest.mark.parametrize(("family", "kind"), [(f, k) for f in EDITED for k in ("image", "mask") if (f, k) != SD3_MASK])
def test_edits_have_previews(family: str, kind: str, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = EngineLoop(tiny(family), Batching(max_num_batched_tokens=1), edits=edit_pipelines(tiny(family)))
    _, events = run_lanes(loop, [job_of(kind, num_previews=2)], monkeypatch)
    assert usage(events["j"]).warnings == ()
    assert [event.step for event in events["j"] if isinstance(event, Preview)] == [1, 2]


def test_a_model_that_takes_an_image_keeps_its_own_pipeline(tiny: Any) -> None:
    assert "image" not in edit_pipelines(tiny("flux2"))
    assert edit_pipelines(tiny("wan")) == {}


def test_masks_say_where_by_being_white_or_transparent() -> None:
    picture = PICTURE.copy()
    picture.putalpha(Image.eval(MASK, lambda value: 255 - value))
    assert (np.asarray(decode_mask(png(picture))) == np.asarray(MASK)).all()
    assert (np.asarray(decode_mask(png(MASK))) == np.asarray(MASK)).all()
