"""Input images of a form and of JSON, on their way to a job."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import httpx
import pytest
from PIL import Image
from starlette.requests import Request

from omni_ray.api.inputs import Uploaded, read_fields, read_images
from omni_ray.api.media import Fetcher
from omni_ray.api.protocol import ImageEditRequest
from omni_ray.config.spec import Api
from omni_ray.errors import RequestError

FILES = ("image", "mask")
FETCHER = Fetcher(Api())


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


def named(image: bytes) -> dict[str, str]:
    return {"image_url": f"data:image/png;base64,{base64.b64encode(image).decode()}"}


async def read(**sent: Any) -> tuple[Uploaded, dict[str, list[bytes]]]:
    """``sent`` is what httpx takes."""
    request = httpx.Request("POST", "http://x", **sent)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": request.content if "json" in sent else request.read()}

    headers = [(name.lower().encode(), value.encode()) for name, value in request.headers.items()]
    asked = Request({"type": "http", "method": "POST", "path": "/", "headers": headers}, receive)
    uploaded = await read_fields(asked, ImageEditRequest, FILES, 2**20)
    return uploaded, await read_images(uploaded, FILES, FETCHER)


async def test_json_and_a_form_say_the_same() -> None:
    red, blue, white = map(png, ("red", "blue", "white"))
    images = {"images": [named(red), {"image_url": named(blue)}], "mask": named(white)}
    images["images"][1]["image_url"] = {"url": named(blue)["image_url"]}  # as chat words it
    by_json, from_json = await read(json={"prompt": "p", "seed": 1, **images})
    files = [("image", ("a.png", red)), ("image[]", ("b.png", blue)), ("mask", ("m.png", white))]
    by_form, from_form = await read(data={"prompt": "p", "seed": "1"}, files=files)
    assert from_json == from_form == {"image": [red, blue], "mask": [white]}
    assert (by_json.fields, by_json.strict) == ({"prompt": "p", "seed": 1}, None)
    assert (by_form.fields, by_form.strict) == ({"prompt": "p", "seed": "1"}, False)
    assert await read(json={"prompt": "p"}) == (Uploaded({"prompt": "p"}), {})


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ({"images": "red.png"}, "images: 'red.png' names no image; give {"),
        ({"images": [named(b""), {"file_id": "f"}]}, "images.1: {'file_id': 'f'} names no image"),
        ({"images": {"image_url": "red.png"}}, "images.image_url: 'red.png' is neither an http or https URL"),
        ({"images": [{"image_url": "data:image/png;base64,?"}]}, "images.0.image_url: the base64 is broken"),
        ({"images": [named(b"no png")]}, "images: is no image; send a PNG, JPEG or WebP"),
        (
            {"images": [{"image_url": "http://x/y.png"}]},
            "images.0.image_url: 'http://x/y.png' is not fetched",
        ),
        ({"mask": [named(png("red"))] * 2}, "mask: there are 2, but one is taken"),
    ],
)
async def test_what_is_no_image_is_refused_by_name(images: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError) as refused:
        await read(json=images)
    assert refused.value.message.startswith(words), json.dumps(refused.value.message)


async def test_one_mask_in_a_form_too() -> None:
    with pytest.raises(RequestError, match="mask: there are 2, but one is taken"):
        await read(files=[("mask", ("m.png", png("red")))] * 2)
