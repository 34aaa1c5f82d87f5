"""A job as it is stored: what was asked for, how far it is, and what came of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import TypeAdapter

from omni_ray.messages import Job, MediaFormat

Status = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
Kind = Literal["image", "video"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredMedia:
    """One output; ``file`` is its name among the job's files."""

    file: str
    format: MediaFormat
    width: int
    height: int
    num_frames: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredJob:
    """One job of the store.

    ``job`` has neither input images nor a snapshot: those are files. ``request`` is what the reply repeats of the
    client's words. Times are Unix seconds; ``start_s`` and ``seconds_left`` are estimates. ``resume_step`` is the step
    of the last snapshot that was stored, 0 if there is none. ``user`` is the name of the API key that it came with.
    """

    id: str
    kind: Kind
    job: Job
    user: str = ""
    request: dict[str, Any] = dataclasses.field(default_factory=dict)
    num_images: int = 0
    has_mask: bool = False
    status: Status = "queued"
    created_at: float
    started_at: float | None = None
    completed_at: float | None = None
    expires_at: float
    queue_position: int | None = None
    start_s: float | None = None
    step: int = 0
    num_steps: int = 0
    steps_skipped: int = 0
    seconds_left: float | None = None
    resume_step: int = 0
    attempts: int = 0
    media: tuple[StoredMedia, ...] = ()
    usage: dict[str, Any] | None = None
    error: dict[str, Any] | None = None

    @property
    def is_over(self) -> bool:
        return self.status in ("completed", "failed", "cancelled")

    def to_json(self) -> bytes:
        return _adapter.dump_json(self)

    @staticmethod
    def from_json(text: str | bytes) -> StoredJob:
        return _adapter.validate_json(text)


_adapter: TypeAdapter[StoredJob] = TypeAdapter(StoredJob)


def input_file(index: int) -> str:
    return f"input-{index}"


MASK_FILE = "mask"


def output_file(index: int, format: str) -> str:
    return f"output-{index}.{format}"


def snapshot_file(step: int) -> str:
    return f"after-step-{step}"
