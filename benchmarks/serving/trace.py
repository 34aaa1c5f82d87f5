"""Traces: a workload as a file, to be sent again as it was.

One request a line, as a JSON object:

    {"at_s": 0.25, "kind": "images", "body": {"model": "demo-image", "prompt": "a red circle", "size": "256x256"}}

``at_s`` is when it arrives, in seconds from the start, and does not fall from line to line. ``kind`` is chat, images or
videos. ``body`` is the body of the request as OpenAI defines it; for videos its fields are sent as a form.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

from benchmarks.serving.request import KINDS, Request

KEYS = {"at_s", "kind", "body"}


def write_trace(requests: Iterable[Request], file: Path) -> None:
    lines = (json.dumps({"at_s": round(r.at_s, 6), "kind": r.kind, "body": r.body}) for r in requests)
    file.write_text("".join(line + "\n" for line in lines))


def read_trace(file: Path) -> list[Request]:
    """The requests of a trace; ValueError naming the line of the first one that is wrong."""
    requests: list[Request] = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            requests.append(_request(line, requests[-1].at_s if requests else 0.0))
        except ValueError as error:
            raise ValueError(f"{file}:{number}: {error}") from error
    if not requests:
        raise ValueError(f"{file} has no requests; write one as a JSON object a line")
    return requests


def _request(line: str, before_s: float) -> Request:
    entry = json.loads(line)
    if not isinstance(entry, dict) or set(entry) != KEYS:
        came = ", ".join(entry) if isinstance(entry, dict) else type(entry).__name__
        raise ValueError(f"a request has {', '.join(sorted(KEYS))}; here came {came or 'nothing'}")
    at_s, kind, body = entry["at_s"], entry["kind"], entry["body"]
    if isinstance(at_s, bool) or not isinstance(at_s, (int, float)) or not math.isfinite(at_s) or at_s < before_s:
        raise ValueError(f"at_s {at_s!r} has to be a number of seconds, and at least {before_s:g}, of the line before")
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is unknown; choose from {', '.join(KINDS)}")
    if not isinstance(body, dict):
        raise ValueError(f"body {body!r} has to be an object")
    return Request(kind, body, float(at_s))
