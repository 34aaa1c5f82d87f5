"""Gangs of two to four CPU ranks, for every family and axis: requests of mixed sizes and step counts side by side, one
of them cancelled midway, one failing. Each image equals the one-rank image within TOLERANCE (fp32, colours in 0..1)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ranks import run_ranks

TOLERANCE = 1e-4

Case = tuple[str, dict[str, Any]]


def case(family: str, **degrees: int) -> Case:
    return family, {"parallel": degrees}


TEACACHE = {"kind": "teacache", "threshold": 1e9, "coefficients": (1.0, 0.0)}
CACHE_DIT: dict[str, Any] = {
    "kind": "cache_dit",
    "cache_dit": {"Fn_compute_blocks": 1, "max_warmup_steps": 1, "residual_diff_threshold": 0.9},
}
"""Below 1, the library compares what it has, and averages that over the ranks."""

ALWAYS = CACHE_DIT | {"cache_dit": CACHE_DIT["cache_dit"] | {"residual_diff_threshold": 1e9}}
"""For Z-Image, whose branches are one call: on ranks of their own they are not padded to each other's length, and the
means of what is compared are others."""

TENSOR = ("flux", "flux2", "qwen_image", "z_image", "sd3", "wan")
TWO = [case(family, **{axis: 2}) for family in TENSOR for axis in ("tensor", "ulysses")]
TWO += [case("flux", ring=2), case("qwen_image", cfg=2)]
TWO += [("qwen_image", {"parallel": {"cfg": 2}, "cache": CACHE_DIT})]
TWO += [("flux", {"parallel": {"ulysses": 2}, "attention": {"fused_qkv": True}})]
TWO += [("flux", {"parallel": {"ulysses": 2}, "vae": {"tiling": True}})]
MORE = [case(family, ring=2) for family in TENSOR[1:]] + [case(family, cfg=2) for family in (*TENSOR, "hunyuan_image")]
MORE += [case("helios", **{axis: 2}) for axis in ("ulysses", "ring", "cfg")]
CACHED: list[Case] = [
    (family, {"parallel": {axis: 2}, "cache": TEACACHE})
    for family in TENSOR
    for axis in ("tensor", "ulysses", "ring", "cfg")
]
CACHED += [("helios", {"parallel": {axis: 2}, "cache": TEACACHE}) for axis in ("ulysses", "ring", "cfg")]
CACHED += [("hunyuan_image", {"parallel": {"cfg": 2}, "cache": TEACACHE})]
CACHED += [(family, {"parallel": {"cfg": 2}, "cache": CACHE_DIT}) for family in ("qwen_image", "wan")]
CACHED += [("z_image", {"parallel": {"cfg": 2}, "cache": ALWAYS})]
FOUR = [case(family, tensor=2, ulysses=2) for family in TENSOR]
FOUR += [case(family, cfg=2, **{axis: 2}) for family in TENSOR for axis in ("tensor", "ulysses")]
FOUR += [case("flux", ring=2, ulysses=2)]
FOUR += [("wan", {"parallel": {"tensor": 2, "ulysses": 2}, "cache": TEACACHE})]
FOUR += [(family, {"parallel": {"cfg": 2, "ulysses": 2}, "cache": TEACACHE}) for family in ("wan", "z_image")]
FOUR += [("wan", {"parallel": {"cfg": 2, "ulysses": 2}, "cache": CACHE_DIT})]

THREE = [case(family, ring=3) for family in ("flux", "qwen_image", "wan")]
"""Neither tokens nor rows of the picture divide by the ranks."""

pytestmark = pytest.mark.slow


def check(cases: list[Case], results: list[dict[str, Any]]) -> None:
    for (family, levers), result in zip(cases, results, strict=True):
        assert [error.split(": ", 1)[1] for error in result["failed"]] == ["ValueError: no such size"], (
            family,
            levers,
        )
        assert result["cancelled"] == [f"{family}-6"], (family, levers)
        assert result["num_made"] == 5, (family, levers)
        assert result["error"] <= TOLERANCE, (family, levers)


def test_two_ranks() -> None:
    check(TWO, run_ranks(2, TWO))


@pytest.mark.thorough
def test_two_ranks_along_the_other_axes() -> None:
    check(MORE, run_ranks(2, MORE))


@pytest.mark.thorough
def test_two_ranks_share_the_decisions_of_their_cache() -> None:
    results = run_ranks(2, CACHED)
    check(CACHED, results)
    assert all(result["skipped"] > 0 for result in results)


@pytest.mark.thorough
def test_three_ranks() -> None:
    check(THREE, run_ranks(3, THREE))


@pytest.mark.thorough
def test_four_ranks() -> None:
    check(FOUR, run_ranks(4, FOUR))
