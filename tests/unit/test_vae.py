"""The autoencoder's own ways to need less memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from omni_ray.accel.apply import accelerate
from omni_ray.config.spec import DitGroup
from omni_ray.errors import ConfigError

CPU = torch.device("cpu")


def draw(pipe: Any, **vae: bool) -> Any:
    """Two images [2, height, width, 3] of one prompt."""
    group = DitGroup.model_validate({"name": "x", "type": "dit", "source": "x", "vae": vae})
    accelerate(pipe, group, CPU)
    generator = torch.Generator().manual_seed(0)
    arguments = {"height": 64, "width": 96, "num_inference_steps": 1, "num_images_per_prompt": 2}
    return pipe(prompt="a red circle", **arguments, generator=generator, output_type="np").images


@pytest.fixture
def pipe(tiny_folder: Any) -> Any:
    """One that a test may change."""
    return DiffusionPipeline.from_pretrained(tiny_folder("flux"))


def test_tiles_are_blended_by_diffusers(pipe: Any) -> None:
    whole, tiled = draw(pipe), draw(pipe, tiling=True)
    assert not np.allclose(tiled, whole, atol=0.01)
    pipe.vae.disable_tiling()
    assert np.array_equal(draw(pipe), whole)
    pipe.vae.enable_tiling()
    assert np.array_equal(draw(pipe), tiled)


def test_slices_make_the_same_picture(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, sizes = draw(pipe), []
    decode = pipe.vae._decode
    monkeypatch.setattr(pipe.vae, "_decode", lambda z, *rest: sizes.append(len(z)) or decode(z, *rest))
    assert np.allclose(draw(pipe, slicing=True), whole, atol=1e-5)
    assert sizes == [1, 1]


def test_an_autoencoder_that_knows_of_no_tiles_is_refused(pipe: Any) -> None:
    pipe.register_modules(vae=torch.nn.Identity())
    with pytest.raises(ConfigError, match=r"vae\.tiling: Identity cannot do that"):
        draw(pipe, tiling=True)
