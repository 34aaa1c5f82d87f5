"""What the ingress knows of the groups: a copy of the router's table, refreshed in the background."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from ray.serve.handle import DeploymentHandle

from omni_ray.api.caller import check_model
from omni_ray.api.meters import note_route
from omni_ray.api.wording import shown
from omni_ray.errors import RequestError, Unavailable, UnknownModel
from omni_ray.messages import GroupStatus, Route

logger = logging.getLogger("ray.serve")

REFRESH_S = 5.0
REFRESH_NOT_READY_S = 1.0


@dataclass(eq=False, slots=True)
class Wait:
    """A request that waits for a group. From ``until`` (event loop time) on it no longer waits for a replica."""

    timer: asyncio.Timeout
    until: float | None = None
    reason: str = ""

    def end(self, reason: str) -> None:
        if not self.reason:
            self.reason = reason
            self.timer.reschedule(0)


class Directory:
    """Routes by name. Neither tokens nor AR requests pass through the router that it asks."""

    def __init__(self, router: DeploymentHandle[Any]) -> None:
        self._router = router
        self._by_name: dict[str, Route] = {}
        self.last_status: dict[str, GroupStatus] = {}
        """By group, at most some seconds old."""
        self._waits: defaultdict[str, set[Wait]] = defaultdict(set)
        self._refreshed = asyncio.Event()
        self._task = asyncio.create_task(self._refresh_forever())

    async def names(self) -> dict[str, Route]:
        """Every name that ``model`` may say, and the route that it means."""
        if not self._by_name:
            await self._refreshed.wait()
        return self._by_name

    async def find(self, name: str) -> Route:
        """The route of a model name; UnknownModel if there is none."""
        names = await self.names()
        route = names.get(name)
        if route is None:
            choices = ", ".join(sorted(names))
            raise UnknownModel(f"The model {shown(name)} does not exist; choose one of: {choices}", param="model")
        return route

    async def open(self, name: str) -> Route:
        """The route that a request names. As :meth:`find`, but NotAllowed if the caller's key does not allow it, and
        Unavailable if a group that the model needs has failed to start."""
        check_model(name, (await self.names()).get(name))
        return await self._open(name)

    async def open_to_draw(self, name: str) -> Route:
        """As :meth:`open`, of a model that makes images or videos; RequestError if it does not."""
        route = await self.open(name)
        if route.type == "ar":
            raise RequestError(f"{route.name} writes text and draws nothing; use /v1/chat/completions", param="model")
        return route

    async def _open(self, name: str) -> Route:
        route = await self.find(name)
        note_route(route)
        for group in parts(route):
            if not route.ready and (reason := failure(self.last_status.get(group))):
                raise Unavailable(reason)
        return route

    async def loaded(self, name: str) -> Route:
        """The route of a DiT group that serves an open one, once a replica has told what its pipeline accepts."""
        route = await self._open(name)
        async with self.alive(route.group):
            while "fields" not in route.limits:
                await self._refreshed.wait()
                route = await self._open(name)
        return route

    async def status(self) -> tuple[GroupStatus, ...]:
        """Every group as the router sees it at this moment."""
        status: tuple[GroupStatus, ...] = await self._router.status.remote()
        return status

    @asynccontextmanager
    async def alive(self, group: str) -> AsyncIterator[Wait]:
        """Ends what is awaited inside with Unavailable when the group fails, or has no replica at ``Wait.until``."""
        wait = Wait(asyncio.timeout(None))
        self._waits[group].add(wait)
        try:
            async with wait.timer:
                yield wait
        except TimeoutError:
            if wait.timer.expired():
                raise Unavailable(wait.reason) from None
            raise
        finally:
            self._waits[group].discard(wait)

    async def _refresh_forever(self) -> None:
        while True:
            try:
                await self._refresh()
            except Exception as error:
                logger.warning("the router does not tell its routes: %s", error)
            await asyncio.sleep(REFRESH_S if self._settled else REFRESH_NOT_READY_S)

    @property
    def _settled(self) -> bool:
        """Whether all that is served is ready, and has told what it accepts."""
        routes = self._by_name.values()
        return bool(routes) and all(r.ready and (r.type != "dit" or "fields" in r.limits) for r in routes)

    async def _refresh(self) -> None:
        routes: tuple[Route, ...] = await self._router.routes.remote()
        self.last_status = {status.group: status for status in await self.status()}
        self._by_name = {name: route for route in routes for name in route.names}
        self._refreshed.set()
        self._refreshed.clear()
        for group, waits in self._waits.items():
            self._end_hopeless(group, waits)

    def _end_hopeless(self, group: str, waits: set[Wait]) -> None:
        status = self.last_status.get(group)
        if status is None or status.ready:
            return
        reason, now = failure(status), asyncio.get_running_loop().time()
        for wait in waits:
            if reason:
                wait.end(reason)
            elif wait.until is not None and now > wait.until:
                wait.end(f"{group} lost its replicas and has none again yet; send the request again later")


def parts(route: Route) -> tuple[str, ...]:
    """The groups that a route needs: its own, or both of a chain."""
    return (route.limits["rewrite"], route.limits["generate"]) if route.type == "pipeline" else (route.group,)


def failure(status: GroupStatus | None) -> str:
    """Why a group cannot start; empty while it is ready or may become so."""
    if status is None or status.ready or not status.progress or status.progress[-1].phase != "failed":
        return ""
    return f"{status.group} failed to start; /ready says why"
