"""Counts and times the HTTP requests, by the model that they are for, for Prometheus."""

from __future__ import annotations

import asyncio
import time
from contextvars import ContextVar
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from omni_ray import metrics
from omni_ray.messages import Route
from omni_ray.meters import Meters

UNCOUNTED = "operation"
"""The tag of routes that are no requests to a model: health checks and the like."""


@dataclass(slots=True)
class Asked:
    """What became known of a request while it was answered."""

    route: Route | None = None
    status: int = 500


_asked: ContextVar[Asked | None] = ContextVar("asked", default=None)


def note_route(route: Route) -> None:
    """The request at hand is for this model. Of a chain, the one that was looked up first."""
    if (asked := _asked.get()) and asked.route is None:
        asked.route = route


def note_failure() -> None:
    """The request at hand failed after its status was sent."""
    if asked := _asked.get():
        asked.status = 500


class Measured:
    """ASGI middleware around the routes. It sees a stream's last piece too."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked, start = Asked(), time.perf_counter()
        before = _asked.set(asked)

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                asked.status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except asyncio.CancelledError:
            asked.status = 499
            raise
        finally:
            _asked.reset(before)
            _record(scope, asked, time.perf_counter() - start)


def _record(scope: Scope, asked: Asked, seconds: float) -> None:
    route = scope.get("route")
    if UNCOUNTED in getattr(route, "tags", ()):
        return
    model, profile = (asked.route.name, asked.route.profile or "") if asked.route else ("", "")
    meters = Meters(model=model, profile=profile, path=getattr(route, "path", ""))
    outcome = {429: "429", 499: "left"}.get(asked.status, f"{asked.status // 100}xx")
    meters.count(metrics.HTTP_REQUESTS, outcome=outcome)
    if outcome == "2xx":
        meters.observe(metrics.HTTP_S, seconds)
