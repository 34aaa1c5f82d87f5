"""``/v1/jobs``: what runs or ran without its client, images and videos alike."""

from __future__ import annotations

from typing import Any

from fastapi import Request, Response
from pydantic_core import to_json

from omni_ray.api import sse
from omni_ray.api.background import Background, job_object
from omni_ray.api.submission import Submission
from omni_ray.errors import RequestError
from omni_ray.store.stored import Kind

KINDS: tuple[Kind, ...] = ("image", "video")


class StoredJobs:
    def __init__(self, background: Background) -> None:
        self._background = background

    async def page(self, request: Request) -> Response:
        """The jobs, the newest first. Query: `limit` (1 to 100), `after` (an id), `order` (`asc`, `desc`)."""
        found, has_more = await self._background.page(KINDS, *_asked(request))
        return answer(page([job_object(each) for each in found], has_more))

    async def get(self, request: Request) -> Response:
        """One job."""
        return answer(job_object(await self._background.get(*which(request, KINDS))))

    async def cancel(self, request: Request) -> Response:
        """Stop the work on a job within one denoise step. One that is over stays as it is."""
        return answer(job_object(await self._background.cancel(*which(request, KINDS))))

    async def delete(self, request: Request) -> Response:
        """Stop a job, and forget it and its outputs."""
        job_id, kinds, user = which(request, KINDS)
        await self._background.delete(job_id, kinds, user)
        return answer({"id": job_id, "object": "job.deleted", "deleted": True})

    async def content(self, request: Request) -> Response:
        """An output's bytes. Query: `index` (from 0)."""
        index = request.query_params.get("index", "0")
        if not (index.isascii() and index.isdecimal() and len(index) < 6):
            raise RequestError(f"index: {index[:80]!r} is no number", param="index")
        data, content_type = await self._background.content(*which(request, KINDS), int(index))
        return Response(data, media_type=content_type)

    async def events(self, request: Request) -> Response:
        """The job's object whenever it changes, as server-sent events, until it is over."""
        events = self._background.events(*which(request, KINDS))
        first = await anext(events)

        async def rest() -> Any:
            yield first
            async for each in events:
                yield each

        return sse.EventStream(rest())


def which(request: Request, kinds: tuple[Kind, ...]) -> tuple[str, tuple[Kind, ...], str]:
    """The job that a path names, of which kinds it may be, and whose it has to be."""
    return request.path_params["job_id"], kinds, Submission.of(request).user


def _asked(request: Request) -> tuple[str, dict[str, str]]:
    return Submission.of(request).user, dict(request.query_params)


def page(objects: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    """A page of a list as OpenAI words it."""
    ends = {"first_id": objects[0]["id"], "last_id": objects[-1]["id"]} if objects else dict[str, Any]()
    return {"object": "list", "data": objects, "has_more": has_more, "first_id": None, "last_id": None} | ends


def answer(body: dict[str, Any], status: int = 200) -> Response:
    return Response(to_json(body), status, media_type="application/json")
