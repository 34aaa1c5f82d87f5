"""Reads a Ray Serve config file and says, for everything that is wrong with it, where and what is needed instead.

``file:line:column: dotted.path: what came, what is needed, the nearest valid key``. Nothing of Ray, torch or a model
library is imported.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from omni_ray.config.document import Document, Problem, dotted, read_yaml
from omni_ray.config.nearest import hint, nearest
from omni_ray.config.serve_file import ServeFile, is_ours
from omni_ray.config.spec import DEMO_SOURCES, OmniSpec
from omni_ray.config.wording import problems_of
from omni_ray.errors import ConfigError


def load(path: str | os.PathLike[str]) -> list[OmniSpec]:
    """The specs of the file's applications that are ours, in its order.

    Raises:
        ConfigError: its message has a line for each problem of the file.
    """
    return [application.args for application in load_file(path).omni_applications]


def load_file(path: str | os.PathLike[str]) -> ServeFile:
    """The whole file. Raises ConfigError as :func:`load` does."""
    file, problems = _parse(Path(path))
    if file is None or problems:
        raise ConfigError("\n".join(map(str, problems)))
    return file


def check(path: str | os.PathLike[str]) -> list[Problem]:
    """Every problem of the file, in the order of its lines; empty if it can be served."""
    return _parse(Path(path))[1]


def _parse(path: Path) -> tuple[ServeFile | None, list[Problem]]:
    file = None
    document = read_yaml(path)
    problems = set(document.problems)
    if document.values:
        try:
            file = ServeFile.model_validate(document.data)
        except ValidationError as error:
            details = error.errors(include_url=False)
            problems.update(problem for each in details for problem in problems_of(each, document))
        problems.update(_source_problems(document))
    return file, sorted(dataclasses.replace(problem, file=str(path)) for problem in problems)


def _source_problems(document: Document) -> Iterator[Problem]:
    """Sources that name nothing. They are looked up in the raw data, so that other problems do not hide them."""
    for i, application in enumerate(_items(document.data, "applications")):
        if not is_ours(application):
            continue
        for j, model in enumerate(_items(application.get("args"), "models")):
            source = model.get("source")
            if isinstance(source, str) and (message := _source_problem(source)):
                path = ("applications", i, "args", "models", j, "source")
                yield Problem(*document.place(path, of_key=False), dotted(path), message)


def _items(mapping: Any, key: str) -> list[dict[Any, Any]]:
    """The mappings of a list, as far as what should be one is one; an empty mapping stands for each other item."""
    items = mapping.get(key) if isinstance(mapping, dict) else None
    return [item if isinstance(item, dict) else {} for item in items] if isinstance(items, list) else []


def _source_problem(source: str) -> str | None:
    if source.startswith("demo:"):
        return None if source in DEMO_SOURCES else f"no demo model is called {source!r}; {hint(source, DEMO_SOURCES)}"
    if not source.startswith(("/", "./", "../", "~")):
        return None
    folder = Path(source).expanduser()
    if folder.exists():
        return None
    siblings = [child.name for child in folder.parent.iterdir()] if folder.parent.is_dir() else []
    near = nearest(folder.name, siblings)
    return f"there is no {source!r} here" + (f"; did you mean {str(Path(source).parent / near)!r}?" if near else "")
