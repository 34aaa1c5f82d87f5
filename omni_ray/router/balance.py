"""Picks, among the replicas of a DiT group, the one with the fewest seconds of work in front of it.

Ray Serve calls :class:`LeastSeconds` in the router's process whenever a job is to be sent. ``remaining_s`` is written
by the router as jobs are admitted, make steps and end.
"""

from __future__ import annotations

from typing import Any

from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica

from omni_ray.messages import Job

remaining_s: dict[str, float] = {}
"""Device seconds that each dispatched job still needs, by job id."""

num_replicas: dict[str, int] = {}
"""Replicas that run now, by deployment name."""


def request_router_config() -> RequestRouterConfig:
    return RequestRouterConfig(request_router_class=f"{__name__}:{LeastSeconds.__name__}")


class LeastSeconds(FIFOMixin, RequestRouter):  # type: ignore[misc]
    """Orders replicas by the sum of ``remaining_s`` of the jobs that run on them."""

    def initialize_state(self, **_: Any) -> None:
        self._jobs: dict[str, tuple[ReplicaID, str]] = {}

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        num_replicas[self._deployment_id.name] = len(replicas)
        super().update_replicas(replicas)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        return [
            [replica]
            for replica in sorted(candidate_replicas, key=lambda replica: self._outstanding_s(replica.replica_id))
        ]

    def _outstanding_s(self, replica_id: ReplicaID) -> float:
        return sum(remaining_s.get(job_id, 0.0) for replica, job_id in self._jobs.values() if replica == replica_id)

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        if pending_request.args and isinstance(job := pending_request.args[0], Job):
            self._jobs[pending_request.metadata.internal_request_id] = (replica_id, job.id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._jobs.pop(internal_request_id, None)
