"""``/v1/images/…``: generations, edits and variations, as OpenAI words them, whole, streamed, or as a job."""

from __future__ import annotations

import base64
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import Response
from pydantic_core import to_json

from omni_ray.api import sse
from omni_ray.api.background import Background, job_object
from omni_ray.api.jobs import Progress, Result
from omni_ray.api.limits import Inputs
from omni_ray.api.pipeline import Drawer, Rewritten
from omni_ray.api.protocol import ImagesRequest
from omni_ray.api.submission import Submission
from omni_ray.messages import Media, Preview, Queued, Route

Step = Rewritten | Progress | Result


class Images:
    """Answers the three paths; what they differ in is the ``request`` and what comes with it."""

    def __init__(self, drawer: Drawer, background: Background) -> None:
        self._drawer = drawer
        self._background = background

    async def answer(
        self, route: Route, request: ImagesRequest, inputs: Inputs, submission: Submission, event_type: str
    ) -> Response:
        """OpenAI's `ImagesResponse` and beside it ``omni``, the seed and the cost; its events named ``event_type``
        where the request says ``stream``; a job where it says ``async``."""
        if request.run_async:
            return await self._submit(route, request, inputs, submission)
        num_previews = request.partial_images or 0 if request.stream else 0
        steps = self._drawer.draw(route, request, inputs, submission.request_id, num_previews)
        if request.stream:
            first = await anext(steps)  # before the head is sent, so that what fails here fails with a status
            return sse.EventStream(_events(request, event_type, first, steps))
        revised, result = {}, None
        async for step in steps:
            if isinstance(step, Rewritten):
                revised = {"revised_prompt": step.text}
            elif isinstance(step, Result):
                result = step
        assert result is not None
        return Response(to_json(_reply(request, revised, result)), media_type="application/json")

    async def _submit(self, route: Route, request: ImagesRequest, inputs: Inputs, submission: Submission) -> Response:
        drawing, job, rewritten = await self._drawer.prepare(route, request, inputs, submission.request_id)
        said = {"prompt": inputs.prompt} | ({"revised_prompt": rewritten.text} if rewritten else {})
        stored = await self._background.submit("image", drawing, job, said, submission)
        return Response(to_json(job_object(stored)), status_code=202, media_type="application/json")


def _reply(request: ImagesRequest, revised: dict[str, str], result: Result) -> dict[str, Any]:
    return {
        "created": int(time.time()),
        "data": [_image(media, request.response_format) | revised for media in result.media],
        **_look(request, result.media[0]),
        "omni": result.omni(),
    }


def _look(request: ImagesRequest, media: Media) -> dict[str, str]:
    return {
        "output_format": media.format,
        "size": f"{media.width}x{media.height}",
        "quality": request.quality or "auto",
        "background": "opaque",
    }


def _image(media: Media, response_format: str) -> dict[str, str]:
    if response_format == "url":
        return {"url": data_url(media)}
    return {"b64_json": base64.b64encode(media.data).decode()}


async def _events(
    request: ImagesRequest, event_type: str, first: Step, steps: AsyncGenerator[Step, None]
) -> AsyncGenerator[bytes, None]:
    """OpenAI's events of a streamed image, and where the request says ``progress`` one of ours at every change."""
    revised: dict[str, str] = {}
    async with aclosing(steps):
        step = first
        while True:
            told: dict[str, Any] = {"created_at": int(time.time())}
            match step:
                case Rewritten():
                    revised = {"revised_prompt": step.text}
                case Preview():
                    told |= {"type": f"{event_type}.partial_image", "partial_image_index": step.index}
                    told |= {"step": step.step} | _image(step.media, "b64_json") | _look(request, step.media)
                    yield sse.typed_event(told)
                case Result():
                    told |= {"type": f"{event_type}.completed", "usage": NO_TOKENS, "omni": step.omni()} | revised
                    told |= _image(step.media[0], "b64_json") | _look(request, step.media[0])
                    yield sse.typed_event(told)
                    return
                case _ if request.progress:
                    yield sse.typed_event({"type": f"{event_type}.progress"} | how_far(step))
            step = await anext(steps)


NO_TOKENS = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
"""Images are no tokens."""


def how_far(step: Progress) -> dict[str, Any]:
    """A job's progress as events tell it: times in seconds, steps from 1."""
    if isinstance(step, Queued):
        place = {"state": "queued", "position": step.position, "start_s": step.start_s}
        return place | {"seconds_left": step.end_s}
    assert not isinstance(step, Preview)
    return {
        "state": "running",
        "step": step.step,
        "num_steps": step.num_steps,
        "computed": step.computed,
        "seconds_left": step.end_s,
    }


def data_url(media: Media) -> str:
    """The media itself as a URL."""
    kind = "video" if media.format == "mp4" else "image"
    return f"data:{kind}/{media.format};base64,{base64.b64encode(media.data).decode()}"
