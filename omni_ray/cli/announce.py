"""What a person is told when the server is ready."""

from __future__ import annotations

import json
from collections.abc import Sequence

from omni_ray.config.serve_file import OmniApplication
from omni_ray.config.spec import Model

CHAT = {"messages": [{"role": "user", "content": "a red circle, please"}]}
IMAGE = {"prompt": "a red circle"}


def announcement(url: str, applications: Sequence[OmniApplication]) -> str:
    """The addresses, the names of the models, and a request to copy."""
    lines = []
    for application in applications:
        models, base = application.args.models, url + (application.route_prefix or "").rstrip("/")
        lines += [f"ready: {base}", f"models: {', '.join(f'{model.id} ({model.type})' for model in models)}"]
        lines += ["try:", *(f"  {line}" for line in _curl(base, models[0]))]
    return "\n".join(lines) or f"ready: {url}"


def _curl(base: str, model: Model) -> list[str]:
    path, body = ("images/generations", IMAGE) if model.type == "dit" else ("chat/completions", CHAT)
    data = json.dumps({"model": model.id, **body})
    return [f"curl {base}/v1/{path} -H 'Content-Type: application/json' \\", f"  -d '{data}'"]
