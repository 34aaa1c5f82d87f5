"""Every combination of levers gives the right image or is refused, as the table in the docs says."""

from __future__ import annotations

import pytest

from tests.levers import CACHES, FILE, TOLERANCE, run_all, table


@pytest.mark.slow
def test_every_combination_of_levers() -> None:
    results = run_all()
    for key, result in results.items():
        _, cache, _, quantization, _ = key
        assert [error.split(": ", 1)[1] for error in result["failed"]] == ["ValueError: no such size"], key
        assert result["num_made"] == 5, key
        assert result["error"] <= TOLERANCE[quantization], key
        assert (result["skipped"] > 0) == (CACHES[cache] != {}), key
    assert table(results) == FILE.read_text(), "docs/levers.md is out of date: python -m tests.levers"
