"""The small models shipped with the package: ``demo:image``, ``demo:video`` and ``demo:chat``."""

from __future__ import annotations

from pathlib import Path

NAMES = ("chat", "image", "video")


def resolve(name: str) -> Path:
    """The folder of a shipped model.

    Args:
        name: ``"image"`` (a diffusers ``FluxPipeline``), ``"video"`` (a diffusers ``WanPipeline``) or ``"chat"`` (a
            transformers ``Qwen3ForCausalLM``).

    Raises:
        ValueError: no demo model has that name.
    """
    if name not in NAMES:
        raise ValueError(f"no demo model is called {name!r}; the known ones are {', '.join(NAMES)}")
    return Path(__file__).parent / name
