"""Writes what `omni-ray serve` reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


def write(file: Path, spec: Mapping[str, Any], host: str = "127.0.0.1", port: int = 8000) -> Path:
    """The Ray Serve file for ``spec``, the arguments of the application. Returns ``file``."""
    application = {"name": "omni", "route_prefix": "/", "import_path": "omni_ray.app:build", "args": dict(spec)}
    config = {"http_options": {"host": host, "port": port}, "applications": [application]}
    file.write_text(yaml.safe_dump(config))
    return file
