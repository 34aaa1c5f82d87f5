"""What crosses a process boundary: jobs travel from the API to a rank, events travel back.

Everything here is frozen, picklable and free of torch, ray, vllm and diffusers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from omni_ray.errors import OmniRayError

FPS = 16
"""Frames per second of a video where the request does not say (Wan's native rate)."""

MediaFormat = Literal["png", "jpeg", "webp", "mp4"]
LoadPhase = Literal["starting", "loading weights", "compiling", "ready", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """Whose job it is: the name of an API key, and the device seconds that its unfinished jobs may need, if bounded."""

    key: str
    outstanding_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One generation request for a DiT group.

    ``params`` holds keyword arguments of the diffusers pipeline's ``__call__`` by their own names (``prompt``,
    ``height``, ``num_inference_steps``, ``guidance_scale``, ...). ``images`` are encoded input images (PNG, JPEG, ...)
    for image-to-image and image-to-video pipelines, and ``mask`` one whose transparent, or else white, parts are to be
    drawn anew. ``fps`` are a video's frames per second. ``seed`` None means a random one, which the reply tells.
    ``owner`` is None where no API keys are asked for. ``num_previews`` are spread over the steps. ``resume`` is what a
    :class:`Snapshot` of this job held.
    """

    id: str
    model: str
    group: str
    params: dict[str, Any]
    num_outputs: int = 1
    seed: int | None = None
    owner: Owner | None = None
    images: tuple[bytes, ...] = ()
    mask: bytes | None = None
    format: MediaFormat = "png"
    compression: int = 100
    fps: int | None = None
    num_previews: int = 0
    resume: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Queued:
    """The job waits: ``position`` jobs are before it; it should start in ``start_s`` seconds and end in ``end_s``."""

    job_id: str
    position: int
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEvent:
    """Denoise step ``step`` of ``num_steps`` (from 1) is done. ``seconds`` is this job's share of device time since
    the last event; ``computed`` is False where a cache answered instead of the transformer. The job should end in
    ``end_s`` seconds, which the router estimates."""

    job_id: str
    step: int
    num_steps: int
    seconds: float
    computed: bool = True
    end_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Media:
    """One finished output, encoded. ``width`` and ``height`` in pixels; ``num_frames`` is 1 for an image."""

    job_id: str
    index: int
    format: MediaFormat
    data: bytes
    width: int
    height: int
    num_frames: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """What the output looks like after ``step``: an image of the first output, of a video its first frame."""

    job_id: str
    index: int
    step: int
    media: Media


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What another rank needs to go on with the job after ``step`` (``Job.resume``)."""

    job_id: str
    step: int
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What the finished job cost.

    ``device_s`` is its share of device time; in it, computation waited ``offload_paid_s`` for weights from the host and
    hid another ``offload_hidden_s`` of copying. ``peak_memory_gib`` is the most that the first rank's device held while
    it computed for the job, 0 on a CPU. The other phases are wall seconds. ``warnings`` tell what the group was asked
    for and is not doing.
    """

    job_id: str
    seed: int
    steps_computed: int
    steps_skipped: int
    device_s: float
    queue_s: float
    run_s: float
    offload_hidden_s: float = 0.0
    offload_paid_s: float = 0.0
    peak_memory_gib: float = 0.0
    cache: str = "none"
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """The job ended in an error. It carries the error itself, so that the API answers with its status."""

    job_id: str
    error: OmniRayError


Event = Queued | StepEvent | Preview | Snapshot | Media | Usage | Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpRequest:
    """An HTTP request on its way to an AR replica, whose engine has an HTTP layer of its own."""

    method: str
    path: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    bound: tuple[str, int] | None = None
    """A field of the body that says how many tokens an answer may have and that the body leaves open, and the most that
    it may be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpHead:
    """The first item of an AR replica's answer; the items after it are pieces of the body, as bytes."""

    status: int
    headers: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadProgress:
    """What a replica does while it starts. ``done_bytes`` of ``total_bytes`` of weights are on the device."""

    group: str
    replica_id: str
    phase: LoadPhase
    done_bytes: int = 0
    total_bytes: int = 0
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Room:
    """What fits into memory: ``alone`` are the pixels of one picture, ``together`` those of all of a request, each of
    ``frames`` frames. A longer video has to be smaller in proportion."""

    alone: int
    together: int
    frames: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a loaded DiT group accepts, read from its pipeline.

    ``fields`` are the keyword arguments that the pipeline's ``__call__`` takes; ``defaults`` are their values where a
    request does not say. Sizes are in pixels and must be multiples of ``size_multiple``; a video's frame count must be
    1 modulo ``frame_multiple``.
    """

    pipeline: str
    output: Literal["image", "video"]
    fields: frozenset[str]
    defaults: dict[str, Any] = field(default_factory=dict)
    size_multiple: int = 16
    frame_multiple: int = 1
    max_pixels: int = 2048 * 2048
    room: Room | None = None
    """Where memory sets a limit."""

    max_steps: int = 200
    max_outputs: int = 10
    max_frames: int = 1
    fps: int = FPS
    edits: dict[str, frozenset[str]] = field(default_factory=dict)
    """The fields of the pipelines that take an ``image``, or an image and a ``mask``, with the same modules."""

    needs: frozenset[Literal["image", "mask"]] = frozenset()
    """What the pipeline itself cannot do without."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One replica group as the API sees it. ``names`` are what a request's ``model`` may say to reach it."""

    group: str
    name: str
    profile: str | None
    type: Literal["ar", "dit", "pipeline"]
    names: tuple[str, ...]
    ready: bool
    limits: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupStatus:
    """A group's replicas by state, the last load phase of each, and the work in front of it in seconds."""

    group: str
    ready: bool
    replicas: dict[str, int]
    progress: tuple[LoadProgress, ...] = ()
    num_queued: int = 0
    num_running: int = 0
    outstanding_s: float = 0.0
    message: str = ""
