"""Where a model comes from: ``demo:`` names become the folders that the package ships, all else is passed on."""

from __future__ import annotations

from pathlib import Path

from omni_ray import demo


def resolve_source(source: str) -> str:
    """A local path or a hub id. ValueError, naming the known ones, for a ``demo:`` model that is not shipped."""
    if source.startswith("demo:"):
        return str(demo.resolve(source.removeprefix("demo:")))
    return str(Path(source).expanduser().absolute()) if source.startswith(("/", "./", "../", "~")) else source
