"""Gangs of two to four CPU ranks, for every family and axis: requests of mixed sizes and step counts side by side, one
of them cancelled midway, one failing. Each image equals the one-rank image within TOLERANCE (fp32, colours in 0..1)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ranks import run_ranks

TOLERANCE = 1e-4

TENSOR = ("flux", "flux2", "qwen_image", "z_image", "sd3", "wan")
TWO: list[tuple[str, dict[str, Any]]] = [
    (family, {axis: 2}) for family in TENSOR for axis in ("tensor", "ulysses", "ring", "cfg")
]
TWO += [(family, {"tensor": 2, "threshold": 1e9}) for family in ("flux", "qwen_image")]
FOUR = [(family, {"tensor": 2, "ulysses": 2}) for family in TENSOR]
FOUR += [(family, {"cfg": 2, axis: 2}) for family in TENSOR for axis in ("tensor", "ulysses")]
FOUR += [("flux", {"ring": 2, "ulysses": 2})]

THREE = [(family, {"ring": 3}) for family in ("flux", "qwen_image", "wan")]
"""Neither tokens nor rows of the picture divide by the ranks."""

pytestmark = pytest.mark.slow


def check(cases: list[tuple[str, dict[str, Any]]], results: list[dict[str, Any]]) -> None:
    for (family, degrees), result in zip(cases, results, strict=True):
        assert [error.split(": ", 1)[1] for error in result["failed"]] == ["ValueError: no such size"], (
            family,
            degrees,
        )
        assert result["cancelled"] == [f"{family}-6"], (family, degrees)
        assert result["num_made"] == 5, (family, degrees)
        assert result["error"] <= TOLERANCE, (family, degrees)


def test_two_ranks() -> None:
    check(TWO, run_ranks(2, TWO))


def test_three_ranks() -> None:
    check(THREE, run_ranks(3, THREE))


def test_four_ranks() -> None:
    check(FOUR, run_ranks(4, FOUR))
