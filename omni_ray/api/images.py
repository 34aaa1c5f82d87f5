"""``/v1/images/generations``, as OpenAI words it."""

from __future__ import annotations

import base64
import time
from typing import Any

from fastapi import Response
from pydantic_core import to_json

from omni_ray.api.jobs import Result
from omni_ray.api.pipeline import Drawer, Rewritten
from omni_ray.api.protocol import ImagesRequest, parse
from omni_ray.messages import Media, Route


async def generate_images(drawer: Drawer, route: Route, body: dict[str, Any], request_id: str) -> Response:
    """OpenAI's `ImagesResponse`, and beside it ``omni``, the seed and the cost."""
    request = parse(ImagesRequest, body)
    rewritten, result = {}, None
    async for step in drawer.draw(route, request, request.prompt, (), request_id):
        if isinstance(step, Rewritten):
            rewritten = {"revised_prompt": step.text}
        else:
            result = step
    assert result is not None
    return Response(to_json(_reply(request, rewritten, result)), media_type="application/json")


def _reply(request: ImagesRequest, rewritten: dict[str, str], result: Result) -> dict[str, Any]:
    first = result.media[0]
    return {
        "created": int(time.time()),
        "data": [_image(media, request.response_format) | rewritten for media in result.media],
        "output_format": first.format,
        "size": f"{first.width}x{first.height}",
        "omni": result.omni(),
    }


def _image(media: Media, response_format: str) -> dict[str, str]:
    if response_format == "url":
        return {"url": data_url(media)}
    return {"b64_json": base64.b64encode(media.data).decode()}


def data_url(media: Media) -> str:
    """The media itself as a URL: nothing is stored, so there is nothing else to point to."""
    kind = "video" if media.format == "mp4" else "image"
    return f"data:{kind}/{media.format};base64,{base64.b64encode(media.data).decode()}"
