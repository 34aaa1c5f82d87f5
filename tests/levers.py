"""Every combination of cache, offload, quantization and parallel axis, and the table of them in the docs.

`python -m tests.levers` runs them all and rewrites docs/levers.md.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from omni_ray.config.spec import DitGroup
from tests.ranks import run_ranks

FILE = Path(__file__).parents[1] / "docs/levers.md"
FAMILIES = {"flux": "FLUX.1", "wan": "Wan2.2"}
TEACACHE = {"threshold": 1e9, "max_consecutive_skips": 1, "coefficients": (1.0, 0.0)}
CACHE_DIT = {"cache_dit": {"Fn_compute_blocks": 1, "max_warmup_steps": 1, "residual_diff_threshold": 1e9}}
CACHES: dict[str, dict[str, Any]] = {
    "none": {},
    "teacache": {"kind": "teacache", **TEACACHE},
    "cache_dit": {"kind": "cache_dit", **CACHE_DIT},
    "both": {"kind": "both", **TEACACHE, **CACHE_DIT},
}
OFFLOADS = ("none", "model", "layerwise", "sequential")
QUANTIZATIONS = ("none", "int8")
AXES: dict[str, dict[str, int]] = {
    "1 rank": {},
    "tensor 2": {"tensor": 2},
    "ulysses 2": {"ulysses": 2},
    "ring 2": {"ring": 2},
    "cfg 2": {"cfg": 2},
}

TOLERANCE = {"none": 1e-4, "int8": 0.05}
"""Against one rank with all weights on the device. Tensor parallelism cuts a weight before it is quantized, so that its
rows have other scales."""

HEADER = """# Which levers go together

Made by `python -m tests.levers`, held by a test. On tiny checkpoints, seven requests side by side, each combination of
cache, offload, quantization and parallel axis. A number is how far the images are from those of one rank with the same
cache and quantization and all weights on the device: the largest difference of a colour in 0..1.
"""

Key = tuple[str, str, str, str, str]


def keys() -> list[Key]:
    return list(itertools.product(FAMILIES, CACHES, OFFLOADS, QUANTIZATIONS, AXES))


def levers(key: Key) -> dict[str, Any]:
    """The blocks of a group."""
    _, cache, offload, quantization, axes = key
    return {
        "cache": CACHES[cache],
        "offload": {"kind": offload},
        "quantization": {"kind": quantization},
        "parallel": AXES[axes],
    }


def refusal(key: Key) -> str | None:
    """Why `check` refuses the combination."""
    try:
        DitGroup.model_validate({"type": "dit", "name": "m", "source": "x", "device": "cpu", **levers(key)})
    except ValidationError as error:
        return str(error.errors()[0]["msg"]).removeprefix("Value error, ")
    return None


def sample() -> list[Key]:
    """A quarter of all combinations, with every pair of two levers' values among them."""
    values: tuple[list[str], ...] = (list(FAMILIES), list(CACHES), list(OFFLOADS), list(QUANTIZATIONS), list(AXES))
    return [key for key in keys() if sum(each.index(v) for each, v in zip(values, key, strict=True)) % 4 == 0]


def run(combinations: list[Key]) -> dict[Key, dict[str, Any]]:
    """What came of those combinations that are not refused."""
    results: dict[Key, dict[str, Any]] = {}
    for axes, degrees in AXES.items():
        chosen = [key for key in combinations if key[4] == axes and not refusal(key)]
        rows = run_ranks(2 if degrees else 1, [(key[0], levers(key)) for key in chosen])
        results |= zip(chosen, rows, strict=True)
    return results


def table(results: dict[Key, dict[str, Any]]) -> str:
    lines = [HEADER]
    for family, title in FAMILIES.items():
        lines += [
            f"## {title}\n",
            f"| cache | offload | quantization | {' | '.join(AXES)} |",
            f"|---|---|---|{'---|' * len(AXES)}",
        ]
        for row in itertools.product(CACHES, OFFLOADS, QUANTIZATIONS):
            cells = [cell((family, *row, axes), results) for axes in AXES]
            lines.append(f"| {' | '.join([*row, *cells])} |")
        lines.append("")
    return "\n".join(lines)


def told(text: str) -> dict[Key, str]:
    """The cells of a table that :func:`table` made."""
    titles, found, family = {title: family for family, title in FAMILIES.items()}, dict[Key, str](), ""
    for line in text.splitlines():
        family = titles.get(line.removeprefix("## "), family)
        cells = line.strip("| ").split(" | ")
        if cells[0] in CACHES:
            found |= {(family, *cells[:3], axes): each for axes, each in zip(AXES, cells[3:], strict=True)}  # type: ignore[misc]
    return found


def cell(key: Key, results: dict[Key, dict[str, Any]]) -> str:
    """The difference to the next power of ten, which is the same on every machine."""
    if key not in results:
        return f"refused: {refusal(key)}"
    error = results[key]["error"]
    return next(text for limit, text in ((1e-4, "≤ 0.0001"), (0.05, "≤ 0.05"), (2.0, "wrong")) if error <= limit)


if __name__ == "__main__":
    FILE.write_text(table(run(keys())))
