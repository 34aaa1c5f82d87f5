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
        alive = [node["node_id"] for node in self._list("nodes") if node["node_ip"] == ip and node["state"] == "ALIVE"]
        return str(alive[0]) if alive else ""

    def has_given_up_node(self, ip: str) -> bool:
        try:
            return not self.node_id(ip)
        except httpx.HTTPError:
            return False

    def has_given_up_actor(self, node_id: str, pid: int) -> bool:
        """``pid``: the number of its process on the node."""
        try:
            actors = self._list("actors", filter_keys="pid", filter_predicates="=", filter_values=str(pid))
        except httpx.HTTPError:
            return False
        return not any(actor["node_id"] == node_id and actor["state"] == "ALIVE" for actor in actors)

    def _list(self, what: str, **params: str) -> list[dict[str, Any]]:
        reply = httpx.get(f"{self._dashboard}/api/v0/{what}", params=params, timeout=2, trust_env=False)
        found: list[dict[str, Any]] = reply.raise_for_status().json()["data"]["result"]["result"]
        return found
