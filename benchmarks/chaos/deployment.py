"""What the chaos bench serves: the demo models, each on two replicas, with an ingress per worker."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import serve_file

CHAT_ENGINE = {"max_model_len": 2048, "enforce_eager": True}


NAMES = ("demo-chat", "demo-image", "demo-video")


def write(
    file: Path,
    jobs: Path,
    replicas: int = 2,
    change: dict[str, dict[str, Any]] | None = None,
    names: Sequence[str] = NAMES,
) -> Path:
    """Write the Ray Serve file. ``jobs`` is the folder of the store that all nodes share, ``change`` what differs, by
    model."""
    common: dict[str, Any] = {"num_replicas": replicas}
    models = [
        {"name": "demo-chat", "type": "ar", "source": "demo:chat", "engine_args": CHAT_ENGINE} | common,
        {"name": "demo-image", "type": "dit", "source": "demo:image"} | common,
        {"name": "demo-video", "type": "dit", "source": "demo:video"} | common,
    ]
    models = [model | (change or {}).get(model["name"], {}) for model in models if model["name"] in names]
    spec = {"models": models, "jobs": {"folder": str(jobs)}, "api": {"num_replicas": 2}}
    return serve_file.write(file, spec, host="0.0.0.0")
