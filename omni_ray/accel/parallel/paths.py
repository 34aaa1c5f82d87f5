"""Modules of a transformer by the paths of the catalog."""

from __future__ import annotations

from typing import Any

import torch


def expand(model: torch.nn.Module, path: str) -> dict[str, Any]:
    """The modules that ``path`` names, by their full names.

    ``*`` is every module of a list, ``-1`` the last, and what a path with a final ``?`` does not find is left out;
    without it, that is an AttributeError.
    """
    found: dict[str, Any] = {"": model}
    optional = path.endswith("?")
    for atom in filter(None, path.removesuffix("?").split(".")):
        found = {
            f"{name}.{child}".lstrip("."): module
            for name, parent in found.items()
            for child, module in _children(parent, atom, optional).items()
        }
    return found


def _children(parent: torch.nn.Module, atom: str, optional: bool) -> dict[str, torch.nn.Module]:
    children = {name: child for name, child in parent.named_children() if child is not None}
    if atom == "*":
        return children
    if atom == "-1":
        atom = next(reversed(children))
    if atom in children:
        return {atom: children[atom]}
    if optional:
        return {}
    raise AttributeError(f"{type(parent).__name__} has no module {atom!r}")
