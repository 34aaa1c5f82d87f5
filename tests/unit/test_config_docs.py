"""docs/configuration.md is what the spec says now."""

from __future__ import annotations

from pathlib import Path

from omni_ray.config.docs import document


def test_the_configuration_table_is_current() -> None:
    page = Path(__file__).parents[2] / "docs/configuration.md"
    assert page.read_text() == document(), "run `make docs`"
