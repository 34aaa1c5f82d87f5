"""The two small models shipped with the package: ``demo:image`` and ``demo:chat``."""

from __future__ import annotations

from pathlib import Path

NAMES = ("chat", "image")


def resolve(name: str) -> Path:
    """The folder of a shipped model.

    Args:
        name: ``"image"`` (a diffusers ``FluxPipeline``) or ``"chat"`` (a transformers ``Qwen3ForCausalLM``).

    Raises:
        ValueError: no demo model has that name.
    """
    if name not in NAMES:
        raise ValueError(f"no demo model is called {name!r}; the known ones are {', '.join(NAMES)}")
    return Path(__file__).parent / name
