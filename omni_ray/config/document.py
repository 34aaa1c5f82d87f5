"""A YAML file as plain data, with the place of every key and value in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

KeyPath = tuple[str | int, ...]


class Place(NamedTuple):
    """Line and column, from 1."""

    line: int
    column: int


@dataclass(frozen=True, order=True)
class Problem:
    """Something in a file that keeps it from being served."""

    line: int
    column: int
    path: str
    message: str
    file: str = ""

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}:{self.column}: "
        return where + (f"{self.path}: {self.message}" if self.path else self.message)


@dataclass
class Document:
    """``keys`` and ``values`` hold the places by path; ``problems`` are those of the YAML itself."""

    data: Any = None
    keys: dict[KeyPath, Place] = field(default_factory=dict)
    values: dict[KeyPath, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def place(self, path: KeyPath, *, of_key: bool) -> Place:
        """Where ``path`` stands; what is not in the file stands where its parent does."""
        places = self.keys if of_key else self.values
        if path in places:
            return places[path]
        return self.place(path[:-1], of_key=True) if path else Place(1, 1)


def dotted(path: KeyPath) -> str:
    """``("models", 0, "name")`` as ``models[0].name``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def read_yaml(path: Path) -> Document:
    """The file's data. What is no YAML, or is ambiguous, is among the problems."""
    document = Document()
    try:
        loader = yaml.SafeLoader(path.read_bytes())
        root = loader.get_single_node()
        if root is None:
            document.problems.append(Problem(1, 1, "", "the file is empty; it needs applications: with a list"))
            return document
        _find_duplicates(root, (), document, ())
        document.data = loader.construct_document(root)
        _find_places(root, (), document, loader)
    except OSError as error:
        document.problems.append(Problem(1, 1, "", f"cannot be read: {error.strerror}"))
    except yaml.YAMLError as error:
        document.problems.append(_syntax_problem(error))
    return document


def _syntax_problem(error: yaml.YAMLError) -> Problem:
    if not isinstance(error, yaml.MarkedYAMLError):
        return Problem(1, 1, "", f"not YAML: {' '.join(str(error).split())}")
    place = _place(error.problem_mark or error.context_mark)
    words = ", ".join(part for part in (error.problem, error.context) if part)
    hint = "; indent with spaces" if "'\\t'" in words else ""
    return Problem(*place, "", f"not YAML: {words}{hint}")


def _find_duplicates(node: yaml.Node, path: KeyPath, document: Document, parents: tuple[yaml.Node, ...]) -> None:
    """Runs before the data is made, because a merge (``<<``) may repeat keys, and then they are no mistake."""
    if node in parents:
        raise yaml.MarkedYAMLError(None, None, f"{dotted(path)} contains itself", node.start_mark)
    parents = (*parents, node)
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _find_duplicates(item, (*path, index), document, parents)
    elif isinstance(node, yaml.MappingNode):
        first: dict[str, Place] = {}
        for key, value in node.value:
            place, below = _place(key.start_mark), (*path, str(key.value))
            if isinstance(key, yaml.ScalarNode) and first.setdefault(key.value, place) != place:
                message = f"key {key.value!r} is there twice, first in line {first[key.value].line}; remove one of them"
                document.problems.append(Problem(*place, dotted(below), message))
            _find_duplicates(value, below, document, parents)


def _find_places(node: yaml.Node, path: KeyPath, document: Document, loader: yaml.SafeLoader) -> None:
    document.values[path] = _place(node.start_mark)
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            document.keys[*path, index] = _place(item.start_mark)
            _find_places(item, (*path, index), document, loader)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            below = (*path, loader.construct_object(key, deep=True))
            document.keys[below] = _place(key.start_mark)
            _find_places(value, below, document, loader)


def _place(mark: Any) -> Place:
    return Place(mark.line + 1, mark.column + 1)
