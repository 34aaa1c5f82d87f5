"""Who asks, and under which id: what of an HTTP request matters beside its body."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import Request

from omni_ray.api import caller
from omni_ray.api.access import REQUEST_ID


@dataclass(frozen=True, slots=True)
class Submission:
    """``user`` is the name of the API key; requests with the same ``idempotency_key`` are one."""

    request_id: str
    user: str = ""
    idempotency_key: str | None = None

    @staticmethod
    def of(request: Request) -> Submission:
        return Submission(
            request_id=request.headers[REQUEST_ID],
            user=owner.key if (owner := caller.owner()) else "",
            idempotency_key=request.headers.get("idempotency-key"),
        )
