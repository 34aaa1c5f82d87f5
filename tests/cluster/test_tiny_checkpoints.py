"""Checkpoints other than the demo models on a real server: image-to-video, and weights in a GGUF file."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import av
import httpx
import numpy as np
import openai
import pytest
import yaml
from PIL import Image

from tests.conftest import Server, serving
from tests.tiny_dit import FAMILIES, build
from tests.tiny_gguf import write

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

FRAMES = {"num_frames": 5, "num_inference_steps": 2, "seed": 1}


@pytest.fixture(scope="module")
def tiny_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("tiny")
    models: list[dict[str, Any]] = [
        {"name": family, "type": "dit", "source": str(build(family, folder / family))} for family in ("wan_i2v", "flux")
    ]
    file = write(FAMILIES["flux"]().transformer, folder / "q8_0.gguf")
    models[1]["quantization"] = {"kind": "gguf", "files": {"transformer": str(file)}}
    application = {"name": "omni", "route_prefix": "/", "import_path": "omni_ray.app:build", "args": {"models": models}}
    application["args"] |= {"jobs": {"folder": str(folder / "jobs")}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump({"applications": [application]}))
    with serving(folder / "tiny.yaml", folder / "log") as running:
        yield running


@pytest.fixture
def client(tiny_server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{tiny_server.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def picture(color: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), color).save(buffer, format="PNG")
    return buffer.getvalue()


def watched(client: openai.OpenAI, video: Any) -> np.ndarray:
    """The frames [F, H, W, 3] of a video, once it is made."""
    while video.status in ("queued", "in_progress"):
        video = client.videos.retrieve(video.id)
    assert video.status == "completed", video.error
    with av.open(io.BytesIO(client.videos.download_content(video.id).read())) as clip:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in clip.decode(video=0)])


def test_a_video_begins_with_the_image_of_its_request(client: openai.OpenAI) -> None:
    def film(color: str) -> np.ndarray:
        file = ("first.png", picture(color), "image/png")
        asked: dict[str, Any] = {"model": "wan_i2v", "prompt": "a circle", "input_reference": file}
        return watched(client, client.videos.create(**asked, size="64x64", extra_body=FRAMES))  # type: ignore[arg-type]

    red, again, blue = film("red"), film("red"), film("blue")
    assert red.shape == (5, 64, 64, 3)
    assert np.array_equal(red, again)
    assert not np.array_equal(red, blue)
    url = f"data:image/png;base64,{base64.b64encode(picture('blue')).decode()}"
    body = {"model": "wan_i2v", "prompt": "a circle", "size": "64x64", "input_reference": {"image_url": url}}
    created = client.post("/videos", body=body | FRAMES, cast_to=httpx.Response)
    assert np.array_equal(watched(client, client.videos.retrieve(created.json()["id"])), blue)


def test_a_first_frame_has_to_come(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.videos.create(model="wan_i2v", prompt="a circle", extra_body=FRAMES)
    assert raised.value.param == "input_reference"


def test_a_gguf_file_draws(client: openai.OpenAI) -> None:
    made = client.images.generate(
        model="flux", prompt="a circle", size="64x64", extra_body={"num_inference_steps": 2, "seed": 1}
    )
    assert made.data
    assert Image.open(io.BytesIO(base64.b64decode(made.data[0].b64_json or ""))).size == (64, 64)
    assert made.model_extra
    assert made.model_extra["omni"]["warnings"] == []
