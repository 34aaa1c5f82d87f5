"""Runs jobs through the router, and waits for what they make."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ray.serve.handle import DeploymentHandle

from omni_ray.api.calls import call, items
from omni_ray.api.directory import Directory
from omni_ray.errors import EngineFailed
from omni_ray.messages import Failure, Job, Media, Route, Usage


@dataclass(frozen=True, slots=True)
class Result:
    """What a finished job made, in order, and what it cost."""

    route: Route
    media: tuple[Media, ...]
    usage: Usage

    def omni(self) -> dict[str, Any]:
        """What OpenAI's replies have no place for: the seed and the cost."""
        cost = {key: value for key, value in dataclasses.asdict(self.usage).items() if key != "job_id"}
        return cost | {"profile": self.route.profile}


class Jobs:
    """``router`` is the router's handle."""

    def __init__(self, router: DeploymentHandle[Any], directory: Directory) -> None:
        self._run = router.options(method_name="run", stream=True)
        self._directory = directory

    async def run(self, route: Route, job: Job) -> Result:
        """The job's outputs and cost. Cancelling this cancels the job; a job's failure is raised as its own error."""
        media, end = await call(self._directory, route.group, lambda: self._attempt(route, job))
        if isinstance(end, Failure):  # raised out here: the router has made its attempts, and another asks for no more
            raise end.error
        return Result(route, tuple(media), end)

    async def _attempt(self, route: Route, job: Job) -> tuple[list[Media], Usage | Failure]:
        media: list[Media] = []
        end: Usage | Failure | None = None
        async for event in items(self._run.remote(job)):
            if isinstance(event, Media):
                media.append(event)
            elif isinstance(event, (Usage, Failure)):
                end = event
        if end is None:
            raise EngineFailed(f"{route.group} ended request {job.id} without an answer")
        return media, end
