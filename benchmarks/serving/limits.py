"""What the server says that its models take, held against a workload before anything is sent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.serving.request import Request

DATASETS = {"ar": ("chat",), "dit": ("images", "videos", "chat"), "pipeline": ("chat", "images", "videos")}
"""Kinds of requests that models of each `type` in `/v1/models` answer; other servers tell no type."""


def find_problems(requests: Sequence[Request], served: Sequence[dict[str, Any]]) -> list[str]:
    """One sentence for each thing that the models in ``served``, the `data` of `/v1/models`, cannot do."""
    models = {str(model["id"]): model for model in served}
    problems: dict[str, None] = {}
    for request in {(r.kind, r.label): r for r in requests}.values():
        if request.model not in models:
            problems[f"the server has no model {request.model!r}; it has {', '.join(sorted(models))}"] = None
        else:
            problems |= dict.fromkeys(_problems(request, models[request.model]))
    return list(problems)


def _problems(request: Request, model: dict[str, Any]) -> Iterator[str]:
    name, limits, type_ = request.model, model.get("limits") or {}, model.get("type")
    if type_ in DATASETS and request.kind not in DATASETS[type_]:
        yield f"{name} is of type {type_}, which answers no {request.kind}; choose another --dataset or --model"
        return
    if request.kind in ("images", "videos"):
        output = limits.get("output", request.kind[:-1])
        if output != request.kind[:-1]:
            yield f"{name} makes {output}s, not {request.kind}; choose another --dataset or --model"
        yield from _size_problems(request, limits)
        yield from _count_problems(request, limits)


def _size_problems(request: Request, limits: dict[str, Any]) -> Iterator[str]:
    size = request.body.get("size")
    if size is None:
        return
    flag = "--size" if request.kind == "images" else "--video-size"
    width, height = (int(part) for part in str(size).split("x"))
    largest, multiple = limits.get("max_pixels"), limits.get("size_multiple", 1)
    if largest is not None and width * height > largest:
        yield f"{request.model}: {size} is {width * height} pixels, at most {largest} are taken; set {flag}"
    if width % multiple or height % multiple:
        yield f"{request.model}: {size} has an edge that is no multiple of {multiple}; set {flag}"


def _count_problems(request: Request, limits: dict[str, Any]) -> Iterator[str]:
    for field, limit in (("num_inference_steps", "max_steps"), ("num_frames", "max_frames"), ("n", "max_outputs")):
        value, largest = request.body.get(field), limits.get(limit)
        if value is not None and largest is not None and value > largest:
            yield f"{request.model}: {field} {value} is more than {largest}, which is the most that is taken"
