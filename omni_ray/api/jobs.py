"""Runs jobs through the router while their clients wait for what they make."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from ray.serve.handle import DeploymentHandle

from omni_ray.api.calls import items, stream
from omni_ray.api.directory import Directory
from omni_ray.errors import EngineFailed
from omni_ray.messages import Event, Failure, Job, Media, Preview, Queued, Route, StepEvent, Usage


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


Progress = Queued | StepEvent | Preview


class Jobs:
    """``router`` is the router's handle."""

    def __init__(self, router: DeploymentHandle[Any], directory: Directory) -> None:
        self._run = router.options(method_name="run", stream=True)
        self._directory = directory

    async def run(self, route: Route, job: Job) -> AsyncGenerator[Progress | Result, None]:
        """How the job gets on, and last its outputs and cost. Closing this cancels the job; a job's failure is raised
        as its own error."""
        media: dict[int, Media] = {}
        async with aclosing(stream(self._directory, route.group, lambda: self._attempt(job))) as events:
            async for event in events:
                if isinstance(event, Failure):  # the router has made its attempts, and another asks for no more
                    raise event.error
                if isinstance(event, Media):
                    media[event.index] = event
                elif isinstance(event, Usage):
                    yield Result(route, tuple(media[i] for i in sorted(media)), event)
                    return
                elif isinstance(event, Progress):
                    yield event
        raise EngineFailed(f"{route.group} ended request {job.id} without an answer")

    def _attempt(self, job: Job) -> AsyncGenerator[Event, None]:
        return items(self._run.remote(job))
