"""What is served, and whether it is up: ``/v1/models``, ``/health`` and ``/ready``."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from fastapi import Request, Response
from pydantic_core import to_json

from omni_ray.api.caller import check_model, may_use
from omni_ray.api.directory import Directory, failure
from omni_ray.errors import without_traceback
from omni_ray.messages import GroupStatus, Route


class Models:
    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._created = int(time.time())

    async def models(self) -> Response:
        """Every name that `model` may say, of those that the API key allows."""
        names = await self._directory.names()
        allowed = [self._model(name, route) for name, route in names.items() if may_use(name, route)]
        return _json({"object": "list", "data": allowed})

    async def model(self, request: Request) -> Response:
        """One of them."""
        name = request.path_params["name"]
        check_model(name, (await self._directory.names()).get(name))
        return _json(self._model(name, await self._directory.find(name)))

    async def health(self) -> Response:
        """200 while the server works; 503 when a model failed to start."""
        failed = {group: reason for group, status in self._directory.last_status.items() if (reason := failure(status))}
        if failed:
            return _json({"status": "failed", "failed": failed}, 503)
        return _json({"status": "ok"})

    async def ready(self) -> Response:
        """200 when every model is ready; else 503, and how far each is."""
        groups = await self._directory.status()
        ready = bool(groups) and all(group.ready for group in groups)
        return _json({"ready": ready, "groups": [_status(group) for group in groups]}, 200 if ready else 503)

    def _model(self, name: str, route: Route) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "omni_ray",
            "type": route.type,
            "profile": route.profile,
            "ready": route.ready,
            "limits": route.limits,
        }


def _status(group: GroupStatus) -> dict[str, Any]:
    """Without the stack traces that Ray puts into its messages; the log of the replica has them."""
    progress = tuple(dataclasses.replace(each, detail=without_traceback(each.detail)) for each in group.progress)
    return dataclasses.asdict(dataclasses.replace(group, progress=progress, message=without_traceback(group.message)))


def _json(body: dict[str, Any], status: int = 200) -> Response:
    return Response(to_json(body), status, media_type="application/json")
