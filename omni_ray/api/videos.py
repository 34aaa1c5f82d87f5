"""``/v1/videos``, as OpenAI words it: a video is a job that is created, polled and downloaded."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastapi import Request, Response

from omni_ray.api.background import Background, job_object
from omni_ray.api.body import model_name
from omni_ray.api.directory import Directory
from omni_ray.api.inputs import read_fields, read_images
from omni_ray.api.limits import Inputs
from omni_ray.api.media import Fetcher
from omni_ray.api.pipeline import Drawer
from omni_ray.api.protocol import VideosRequest, parse
from omni_ray.api.stored_jobs import answer, page, which
from omni_ray.api.submission import Submission
from omni_ray.errors import OmniRayError, RequestError
from omni_ray.messages import Job, Route
from omni_ray.store.stored import Kind, StoredJob

KINDS: tuple[Kind, ...] = ("video",)
FIRST_FRAME = "input_reference"


class Videos:
    def __init__(
        self, directory: Directory, drawer: Drawer, background: Background, fetcher: Fetcher, max_body_bytes: int
    ) -> None:
        self._directory = directory
        self._drawer = drawer
        self._background = background
        self._fetcher = fetcher
        self._max_body_bytes = max_body_bytes

    async def create(self, request: Request) -> Response:
        """Queue a video, and answer with its object. The body is JSON or a form; `input_reference` is the first frame:
        a file of the form, or `{"image_url": …}` in JSON."""
        return answer(video_object(await self._submit(request)))

    async def create_and_wait(self, request: Request) -> Response:
        """As `/v1/videos`, but the answer is the video itself."""
        stored = await self._submit(request)
        try:
            over = await self._background.wait(stored.id, KINDS, stored.user)
        except BaseException:
            await self._background.cancel(stored.id, KINDS, stored.user)
            raise
        if over.error is not None:
            raise OmniRayError(over.error["message"])
        data, content_type = await self._background.content(over.id, KINDS, over.user)
        return Response(data, media_type=content_type, headers={"x-video-id": over.id})

    async def page(self, request: Request) -> Response:
        """The videos, the newest first. Query: `limit` (1 to 100), `after` (an id), `order` (`asc`, `desc`)."""
        query = dict(request.query_params)
        found, has_more = await self._background.page(KINDS, Submission.of(request).user, query)
        return answer(page([video_object(each) for each in found], has_more))

    async def get(self, request: Request) -> Response:
        """One video's object."""
        return answer(video_object(await self._background.get(*which(request, KINDS))))

    async def delete(self, request: Request) -> Response:
        """Stop a video's job, and forget it and the video."""
        job_id, kinds, user = which(request, KINDS)
        await self._background.delete(job_id, kinds, user)
        return answer({"id": job_id, "object": "video.deleted", "deleted": True})

    async def content(self, request: Request) -> Response:
        """The video as MP4."""
        if (variant := request.query_params.get("variant", "video")) != "video":
            raise RequestError(f"variant: {variant[:80]!r} is not made; there is 'video'", param="variant")
        data, content_type = await self._background.content(*which(request, KINDS))
        return Response(data, media_type=content_type)

    async def _submit(self, request: Request) -> StoredJob:
        uploaded = await read_fields(request, VideosRequest, (FIRST_FRAME,), self._max_body_bytes)
        route = await self._directory.open_to_draw(model_name(uploaded.fields))
        files = await read_images(uploaded, (FIRST_FRAME,), self._fetcher)
        asked = parse(VideosRequest, uploaded.fields, strict=uploaded.strict)
        submission = Submission.of(request)
        inputs = Inputs(prompt=asked.prompt, images=tuple(files.get(FIRST_FRAME, ())), image_field=FIRST_FRAME)
        drawing, job, rewritten = await self._drawer.prepare(route, asked, inputs, submission.request_id)
        if drawing.limits["output"] != "video":
            raise RequestError(f"{route.name} makes images; use /v1/images/generations", param="model")
        job = timed(asked, drawing, job)
        said = {"prompt": asked.prompt} | ({"revised_prompt": rewritten.text} if rewritten else {})
        return await self._background.submit("video", drawing, job, said, submission)


def timed(asked: VideosRequest, drawing: Route, job: Job) -> Job:
    """The job with its frames and their rate, from ``seconds`` where ``num_frames`` is not said.

    :raises RequestError: so many seconds are more frames than the model makes.
    """
    limits = drawing.limits
    fps, multiple = asked.fps or limits["fps"], limits["frame_multiple"]
    if asked.seconds is None or asked.num_frames is not None:
        return dataclasses.replace(job, fps=fps)
    num_frames = max(1, round(asked.seconds * fps / multiple) * multiple + 1 % multiple)
    if num_frames > limits["max_frames"]:
        longest = f"{limits['max_frames'] / fps:.1f} s at {fps} frames a second"
        problem = f"{asked.seconds:g} s are {num_frames} frames, more than {limits['max_frames']}; ask for {longest}"
        raise RequestError(f"seconds: {problem}", param="seconds")
    return dataclasses.replace(job, fps=fps, params=job.params | {"num_frames": num_frames})


def video_object(stored: StoredJob) -> dict[str, Any]:
    """The job as OpenAI's `Video`, and the keys of ``/v1/jobs`` beside those."""
    params, media = stored.job.params, stored.media[0] if stored.media else None
    fps = stored.job.fps or 1
    num_frames = media.num_frames if media else params.get("num_frames")
    status = "failed" if stored.status == "cancelled" else stored.status
    error = {"code": "cancelled", "message": "the job was cancelled"} if stored.status == "cancelled" else stored.error
    width, height = (getattr(media, name, None) or params.get(name) for name in ("width", "height"))
    return job_object(stored) | {
        "object": "video",
        "status": status,
        "error": error,
        "size": f"{width}x{height}" if width and height else None,
        "seconds": None if num_frames is None else f"{num_frames / fps:g}",
        "quality": "standard",
        "remixed_from_video_id": None,
    }
