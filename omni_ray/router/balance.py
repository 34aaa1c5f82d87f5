"""Picks, among the replicas of a DiT group, the one with the fewest seconds of work in front of it.

Ray Serve calls :class:`LeastSeconds` in the router's process whenever a job is to be sent.
"""

from __future__ import annotations

from typing import Any

from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica

from omni_ray.messages import Job
from omni_ray.router import outstanding


def request_router_config() -> RequestRouterConfig:
    return RequestRouterConfig(request_router_class=f"{__name__}:{LeastSeconds.__name__}")


class LeastSeconds(FIFOMixin, RequestRouter):  # type: ignore[misc]
    """Orders replicas by the sum of `outstanding.remaining_s` of the jobs that are sent to them."""

    def initialize_state(self, **_: Any) -> None:
        self._replica_of: dict[str, ReplicaID] = {}

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        outstanding.num_replicas[self._deployment_id.name] = len(replicas)
        super().update_replicas(replicas)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The job is counted where it is to go first: of several that come at once, each sees those before it."""
        self._replica_of = {job: replica for job, replica in self._replica_of.items() if job in outstanding.remaining_s}
        if (job := _job_of(pending_request)) is not None:
            self._replica_of.pop(job.id, None)
        ranked = sorted(candidate_replicas, key=lambda replica: self._outstanding_s(replica.replica_id))
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # where all are full, before they are asked again
        if job is not None and ranked:
            self._replica_of[job.id] = ranked[0].replica_id
        return [[replica] for replica in ranked]

    def _outstanding_s(self, replica_id: ReplicaID) -> float:
        return sum(outstanding.remaining_s[job] for job, replica in self._replica_of.items() if replica == replica_id)

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        if (job := _job_of(pending_request)) is not None:
            self._replica_of[job.id] = replica_id


def _job_of(request: PendingRequest | None) -> Job | None:
    """None for the calls that are not jobs, such as ``describe``."""
    return request.args[0] if request and request.args and isinstance(request.args[0], Job) else None
