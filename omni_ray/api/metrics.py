"""``/metrics``: what every node of the cluster exports to Prometheus (Ray, Serve, vLLM, ours), at one address."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

import httpx
import ray
from fastapi import Response

from omni_ray.metrics import NODE_SCRAPED

logger = logging.getLogger("ray.serve")

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
TIMEOUT_S = 2.0
SCRAPED = NODE_SCRAPED.shown
NAMELESS = ("python_", "process_", "target_info")
"""Families that each node has of its exporter. They do not tell the node, so that those of two would be one series."""


async def metrics() -> Response:
    """Ray exports each node's metrics at an address of its own. A node that does not answer in time is left out, and
    `omni_ray_node_scraped` tells so."""
    nodes = await asyncio.to_thread(ray.nodes)
    addresses = [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in nodes if node["Alive"]]
    async with httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=False) as client:
        pages = await asyncio.gather(*(_scrape(client, address) for address in addresses))
    found = zip(addresses, pages, strict=True)
    head = f"# HELP {SCRAPED} {NODE_SCRAPED.description}\n# TYPE {SCRAPED} {NODE_SCRAPED.kind}\n"
    scraped = head + "".join(f'{SCRAPED}{{node="{a}"}} {int(page is not None)}\n' for a, page in found)
    return Response(merge([*(page for page in pages if page is not None), scraped]), media_type=CONTENT_TYPE)


async def _scrape(client: httpx.AsyncClient, address: str) -> str | None:
    try:
        response = await client.get(f"http://{address}/metrics")
        response.raise_for_status()
    except httpx.HTTPError as error:
        logger.warning("no metrics from node %s: %r", address, error)
        return None
    return response.text


def merge(pages: Iterable[str]) -> str:
    """Several pages of Prometheus' text format as one that describes each metric once, as the format demands."""
    families: dict[str, list[str]] = {}
    described: set[tuple[str, str]] = set()
    for page in pages:
        family = families.setdefault("", [])
        for line in page.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                _, kind, name = line.split(" ", 3)[:3]
                family = families.setdefault(name, [])
                if (kind, name) in described:
                    continue
                described.add((kind, name))
            if line:
                family.append(line)
    told = [lines for name, lines in families.items() if not name.startswith(NAMELESS)]
    return "".join(f"{line}\n" for lines in told for line in lines)
