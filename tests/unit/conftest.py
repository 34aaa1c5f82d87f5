"""Tiny checkpoints of every family, built once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline

from tests.tiny_dit import build


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of a family."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = build(family, tmp_path_factory.mktemp(family))
        return made[family]

    return folder


@pytest.fixture(scope="module")
def tiny(tiny_folder: Callable[[str], Path]) -> Callable[[str], DiffusionPipeline]:
    """The pipeline of a family. The tests of a module share it, so they leave its modules as they are."""
    made: dict[str, DiffusionPipeline] = {}

    def load(family: str) -> DiffusionPipeline:
        if family not in made:
            made[family] = DiffusionPipeline.from_pretrained(tiny_folder(family))
            made[family].set_progress_bar_config(disable=True)
        return made[family]

    return load
