"""Combinations of levers give the right image or are refused, as the table in the docs says."""

from __future__ import annotations

import pytest

from tests.levers import CACHES, FILE, TOLERANCE, cell, keys, refusal, run, sample, told


@pytest.mark.thorough
def test_a_quarter_of_the_combinations() -> None:
    results = run(sample())
    for key, result in results.items():
        _, cache, _, quantization, _ = key
        assert [error.split(": ", 1)[1] for error in result["failed"]] == ["ValueError: no such size"], key
        assert result["num_made"] == 5, key
        assert result["error"] <= TOLERANCE[quantization], key
        assert (result["skipped"] > 0) == (CACHES[cache] != {}), key
    table = told(FILE.read_text())
    assert {key: table[key] for key in results} == {key: cell(key, results) for key in results}


def test_the_table_is_whole() -> None:
    table = told(FILE.read_text())
    assert table.keys() == set(keys())
    for key, text in table.items():
        assert (text == f"refused: {refusal(key)}") == (refusal(key) is not None), key
        assert text != "wrong", key
