"""Whose request a task answers: the API key with its limits, and what the audit line will tell.

`access.Access` sets it for the task of each request. What looks up models and makes jobs asks here, so that no path can
forget to.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from omni_ray.api.wording import shown
from omni_ray.config.keys import ApiKey, KeyLimits
from omni_ray.errors import NotAllowed
from omni_ray.messages import Job, Owner, Route


@dataclass(slots=True)
class Caller:
    """``key`` is None where no keys are asked for. ``body`` and ``drawn`` are kept for the audit line alone, and only
    where ``keeps_prompts``."""

    request_id: str
    key: ApiKey | None = None
    keeps_prompts: bool = False
    model: str | None = None
    job: Job | None = None
    body: dict[str, Any] = field(default_factory=dict)
    drawn: list[str] = field(default_factory=list)
    failed: bool = False


CALLER: ContextVar[Caller | None] = ContextVar("caller", default=None)


def limits() -> KeyLimits | None:
    """Those of the caller's key."""
    caller = CALLER.get()
    return caller.key.limits if caller and caller.key else None


def owner() -> Owner | None:
    """Whose the jobs of this request are."""
    caller = CALLER.get()
    if caller is None or caller.key is None:
        return None
    return Owner(key=caller.key.name, outstanding_s=caller.key.limits.outstanding_s)


def may_use(name: str, route: Route | None) -> bool:
    """Whether the caller's key allows the model that a request calls ``name``."""
    allowed = (bounds := limits()) and bounds.models
    if allowed is None:
        return True
    return not {name, name.partition(":")[0], *(route.names if route else ())}.isdisjoint(allowed)


def check_model(name: str, route: Route | None) -> None:
    """Note the model for the audit line. NotAllowed if the key does not allow it: of one that does not exist too, so
    that nobody learns here what there is."""
    caller = CALLER.get()
    if caller is None:
        return
    caller.model = name
    if not may_use(name, route):
        assert caller.key is not None
        choices = ", ".join(caller.key.limits.models or ()) or "none"
        raise NotAllowed(
            f"The API key {caller.key.name!r} does not have access to the model {shown(name)}; it has access to: "
            f"{choices}",
            param="model",
        )


def note_body(body: dict[str, Any]) -> None:
    caller = CALLER.get()
    if caller is not None and caller.keeps_prompts:
        caller.body = body


def note_job(job: Job) -> None:
    caller = CALLER.get()
    if caller is not None:
        caller.job = job
        if caller.keeps_prompts:
            caller.drawn.append(str(job.params["prompt"]))


def note_failure() -> None:
    """A stream ended in an error, after its head with status 200."""
    caller = CALLER.get()
    if caller is not None:
        caller.failed = True
