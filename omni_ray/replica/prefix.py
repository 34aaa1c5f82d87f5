"""Which replica of an AR group takes a request: the least busy one, or the one that has seen the prompt's beginning."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from omni_ray.messages import HttpRequest

MAX_OPENING_BYTES = 8192


def request_router_config(routing: str) -> RequestRouterConfig:
    """Ray Serve's own power of two choices for ``balanced``, `PrefixRouter` for ``prefix``."""
    if routing == "prefix":
        return RequestRouterConfig.model_validate({"request_router_class": f"{__name__}:{PrefixRouter.__name__}"})
    return RequestRouterConfig()


class PrefixRouter(RequestRouter):  # type: ignore[misc]
    """Sends prompts with the same opening to the same replica, unless that one is much busier than the rest.

    The opening is everything up to and including the first user message (`opening`): all turns of a conversation go
    where their history lies in the prefix cache, while users who merely share a system prompt spread over the
    replicas, each of which caches that prompt once. Replicas are ranked by rendezvous hashing (Thaler and
    Ravishankar, 1998), so every caller agrees without shared state, and a replica that comes or goes moves its own
    share of openings only. Load is bounded as in consistent hashing with bounded loads (Mirrokni et al., 2018): a
    replica with more than ``load_factor`` times its fair share of the requests in flight is passed over, except below
    ``free_requests`` of them. In exchange for its statelessness it does not know what is still in the caches, and it
    finds no common beginnings that are longer or shorter than the opening. Loads are those that this caller last saw
    (Serve's queue length cache), so requests of one instant are not spread.

    It reads the call's first argument, an `HttpRequest`; callers set nothing.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        self._load_factor = float(kwargs.get("load_factor", 1.25))
        self._free_requests = int(kwargs.get("free_requests", 8))

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None or not pending_request.args:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        key = opening(pending_request.args[0])
        if key is None:
            return [candidate_replicas]
        ranked = sorted(candidate_replicas, key=lambda replica: _weight(key, replica.replica_id), reverse=True)
        loads = {r.replica_id: self.replica_queue_len_cache.get(r.replica_id) or 0 for r in ranked}
        fair_share = (sum(loads.values()) + 1) / len(ranked)
        bound = max(math.ceil(self._load_factor * fair_share), self._free_requests)
        free = [[replica] for replica in ranked if loads[replica.replica_id] < bound]
        return [*free, ranked]


def opening(request: HttpRequest) -> bytes | None:
    """The beginning of the request's prompt: the messages up to the first one of the user, or the ``prompt`` or
    ``input`` text, at most `MAX_OPENING_BYTES` of its JSON. None where there is no prompt to read."""
    try:
        body = json.loads(request.body)
    except ValueError:
        return None
    if not isinstance(body, dict):
        return None
    if isinstance(messages := body.get("messages"), list):
        prompt: Any = _to_first_user(messages)
    else:
        prompt = body.get("prompt", body.get("input"))
    return json.dumps(prompt).encode()[:MAX_OPENING_BYTES] if prompt else None


def _to_first_user(messages: list[Any]) -> list[Any]:
    for i, message in enumerate(messages):
        if isinstance(message, dict) and message.get("role") == "user":
            return messages[: i + 1]
    return messages


def _weight(key: bytes, replica: ReplicaID) -> bytes:
    return hashlib.blake2b(key, key=replica.unique_id.encode()[:64], digest_size=8).digest()
