"""The shape of the code: short files, short functions, and a sentence at the top of each file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = (".ci", "benchmarks", "deployments", "docs", "omni_ray", "scripts", "tests")
SUFFIXES = {"", ".html", ".md", ".py", ".sh", ".toml", ".yaml"}
GENERATED = {"docs/configuration.md"}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def files(*suffixes: str) -> list[str]:
    """Files of ours with one of ``suffixes``, as paths from the root."""
    found = [path for pattern in ("*", *(f"{folder}/**/*" for folder in FOLDERS)) for path in ROOT.glob(pattern)]
    names = {path.relative_to(ROOT).as_posix() for path in found if path.is_file() and path.suffix in suffixes}
    return sorted(names - GENERATED)


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("name", files(*SUFFIXES))
def test_file_is_short(name: str) -> None:
    num_lines = len((ROOT / name).read_text().splitlines())
    assert num_lines <= MAX_FILE_LINES, f"{name} has {num_lines} lines, {MAX_FILE_LINES} are allowed; split it"


@pytest.mark.parametrize("name", [name for name in files(".py") if name.startswith("omni_ray/")])
def test_file_opens_with_a_docstring(name: str) -> None:
    assert ast.get_docstring(ast.parse((ROOT / name).read_text())), f"{name}: say in one sentence what it is"


@pytest.mark.parametrize("name", files(".py"))
def test_functions_are_short(name: str) -> None:
    for function in functions(ast.parse((ROOT / name).read_text())):
        num_lines = function.end_lineno - function.lineno + 1 if function.end_lineno else 0
        assert num_lines <= MAX_FUNCTION_LINES, (
            f"{name}:{function.lineno}: {function.name} has {num_lines} lines, {MAX_FUNCTION_LINES} are allowed"
        )
