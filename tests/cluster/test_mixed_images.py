"""Requests of all kinds, side by side: each image is the one that the plain diffusers pipeline makes of it alone."""

from __future__ import annotations

import base64
import concurrent.futures
import io
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

from omni_ray.sources import resolve_source
from tests.conftest import Server
from tests.unit.test_engine import BATCH_TOLERANCE

pytestmark = pytest.mark.cluster

PROMPTS = ("a red circle", "a small green triangle left of a large blue square on a yellow background")
SHAPES = ((256, 256), (128, 256))
REQUESTS: list[dict[str, Any]] = [
    {
        "prompt": PROMPTS[i % 2],
        "width": SHAPES[i // 2 % 2][0],
        "height": SHAPES[i // 2 % 2][1],
        "num_inference_steps": 4 + i % 5,
        "seed": i,
    }
    for i in range(16)
]


@pytest.mark.slow
def test_sixteen_mixed_requests(server: Server) -> None:
    def drawn(request: dict[str, Any]) -> Any:
        body = {"model": "demo-image", **request}
        reply = httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=120)
        assert reply.status_code == 200, reply.text
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(reply.json()["data"][0]["b64_json"]))), dtype=int)

    with concurrent.futures.ThreadPoolExecutor(len(REQUESTS)) as pool:
        images = list(pool.map(drawn, REQUESTS))
    pipe = FluxPipeline.from_pretrained(resolve_source("demo:image"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for request, image in zip(REQUESTS, images, strict=True):
        arguments = {name: value for name, value in request.items() if name != "seed"}
        generator = torch.Generator("cpu").manual_seed(request["seed"])
        alone = pipe(**arguments, guidance_scale=1.0, max_sequence_length=32, generator=generator).images[0]
        difference = np.abs(np.asarray(alone, dtype=int) - image).max()
        assert difference <= BATCH_TOLERANCE, (request, difference)
