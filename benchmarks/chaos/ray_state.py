"""What Ray's control store counts as alive, asked over the dashboard of the head."""

from __future__ import annotations

from typing import Any

import httpx


class RayState:
    """While the head does not answer, all counts as it was before."""

    def __init__(self, dashboard: str) -> None:
        self._dashboard = dashboard

    def node_id(self, ip: str) -> str:
        """Of the node that is alive there; empty where none is."""
        alive = [each for each in self._nodes() if each["ip"] == ip and each["raylet"].get("state") == "ALIVE"]
        return str(alive[0]["raylet"]["nodeId"]) if alive else ""

    def has_given_up_node(self, ip: str) -> bool:
        try:
            return not self.node_id(ip)
        except httpx.HTTPError:
            return False

    def has_given_up_actor(self, node_id: str, pid: int) -> bool:
        """``pid``: the number of its process on the node."""
        try:
            found = self._get("/api/v0/actors", filter_keys="pid", filter_predicates="=", filter_values=str(pid))
        except httpx.HTTPError:
            return False
        actors = found["data"]["result"]["result"]
        return not any(actor["node_id"] == node_id and actor["state"] == "ALIVE" for actor in actors)

    def _nodes(self) -> list[dict[str, Any]]:
        nodes: list[dict[str, Any]] = self._get("/nodes", view="summary")["data"]["summary"]
        return nodes

    def _get(self, path: str, **params: str) -> Any:
        reply = httpx.get(self._dashboard + path, params=params, timeout=2, trust_env=False)
        return reply.raise_for_status().json()
