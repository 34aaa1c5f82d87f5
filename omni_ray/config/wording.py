"""Words what pydantic refuses: the key, what came, what is needed, and the nearest key or value."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, get_args

from omni_ray.config.document import Document, KeyPath, Problem, dotted
from omni_ray.config.nearest import hint, nearest
from omni_ray.config.serve_file import TAGS, ServeFile
from omni_ray.config.spec import Block

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

# A near key of another block must be nearer than one of the block itself.
SIMILARITY_ELSEWHERE = 0.8
MAX_VALUE_CHARS = 60


def problems_of(error: ErrorDetails, document: Document) -> Iterator[Problem]:
    """The problems that one error of pydantic stands for, at their places."""
    path, block = _resolve(error["loc"])
    match error["type"]:
        case "value_error":
            for line in str(error["ctx"]["error"]).splitlines():
                yield _validator_problem(path, line, document)
        case "union_tag_not_found":
            misspelt = nearest("type", map(str, error["input"]))
            message = f"unknown key {misspelt!r}; did you mean 'type'?" if misspelt else "is missing; choose from "
            message += "" if misspelt else _choices(TAGS.keys() - {"ours", "foreign"})
            yield _problem((*path, misspelt or "type"), message, document, of_key=True)
        case "union_tag_invalid":
            tag, choices = str(error["ctx"]["tag"]), re.findall(r"'([^']*)'", error["ctx"]["expected_tags"])
            yield _problem((*path, "type"), f"came {tag!r}; {hint(tag, choices)}", document)
        case "extra_forbidden":
            yield _problem(path, _unknown_key(str(path[-1]), block), document, of_key=True)
        case "missing":
            yield _problem(path, _missing(str(path[-1]), block), document, of_key=True)
        case "invalid_key":
            place = document.place(path, of_key=True)
            yield Problem(
                *place, dotted(path[:-1]), f"key {error['input']!r} is no text; put it in quotes if it is meant"
            )
        case _:
            yield _problem(path, _wrong_value(error), document)


def _resolve(loc: tuple[str | int, ...]) -> tuple[KeyPath, type[Block] | None]:
    """The path in the file, and the block that should hold its last key. In ``loc`` a tag follows a list's index."""
    path: list[str | int] = []
    holder: type[Block] | None = None
    current: type[Block] | None = ServeFile
    for part in loc:
        if part == "[key]":
            continue
        if path and isinstance(path[-1], int) and part in TAGS:
            current = TAGS[str(part)]
            continue
        path.append(part)
        holder, current = current, _block(current, part) if current else None
    return tuple(path), holder


def _block(holder: type[Block], key: str | int) -> type[Block] | None:
    """The block that is the value of ``key``, if its value is one."""
    if key not in holder.model_fields:
        return None
    annotation = holder.model_fields[str(key)].annotation
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, Block):
            return kind
    return None


def _problem(path: KeyPath, message: str, document: Document, *, of_key: bool = False) -> Problem:
    return Problem(*document.place(path, of_key=of_key), dotted(path), message)


def _validator_problem(path: KeyPath, message: str, document: Document) -> Problem:
    """Our own validators begin their message with the key that they mean, from their block on."""
    said = re.match(r"[\w.\[\]-]+", message)
    below = tuple(
        int(part[1:-1]) if part[0] == "[" else part
        for part in re.findall(r"\[\d+\]|[^.\[\]]+", said[0] if said else "")
    )
    if below and (*path, *below) in document.values:
        path = (*path, *below)
        message = re.sub(r"^[\w.\[\]-]+( = |: )", "", message)
    return _problem(path, message, document)


def _unknown_key(key: str, block: type[Block] | None) -> str:
    """Looks in the block, then among the names that vLLM has for its keys, then in the blocks below it."""
    if block is None:
        return f"unknown key {key!r}"
    near = nearest(key, block.model_fields) or block.aliases.get(key.replace("-", "_"))
    if near is None:
        below = dict(_keys_below(block))
        found = nearest(key, below, SIMILARITY_ELSEWHERE)
        near = below[found] if found else None
    if near:
        return f"unknown key {key!r}; did you mean {near!r}?"
    free = [name for name, field in block.model_fields.items() if field.annotation == dict[str, Any]]
    free_hint = (
        f" (or put it under {free[-1]}, which takes any)" if free and free[-1] in ("engine_args", "defaults") else ""
    )
    return f"unknown key {key!r}; choose from {_choices(block.model_fields)}{free_hint}"


def _keys_below(block: type[Block]) -> Iterator[tuple[str, str]]:
    for name in block.model_fields:
        for child in [TAGS["ours"]] if name == "applications" else [_block(block, name)]:
            for key in child.model_fields if child else ():
                yield key, f"{name}.{key}"
            yield from ((key, f"{name}.{path}") for key, path in (_keys_below(child) if child else ()))


def _missing(key: str, block: type[Block] | None) -> str:
    description = block.model_fields[key].description if block and key in block.model_fields else None
    return f"is missing ({description[0].lower()}{description[1:].rstrip('.')})" if description else "is missing"


def _wrong_value(error: ErrorDetails) -> str:
    value, need = error["input"], error["msg"]
    if error["type"] in ("model_type", "dict_type", "model_attributes_type"):
        need = "it should be a mapping of keys to values"
    came = repr(value)
    came = came if len(came) <= MAX_VALUE_CHARS else f"{came[:MAX_VALUE_CHARS]}..."
    message = f"came {came}; " + re.sub(r"^(Input|String|List) should ", "it should ", need)
    if error["type"] == "literal_error" and isinstance(value, str):
        near = nearest(value, re.findall(r"'([^']*)'", error["ctx"]["expected"]))
        message += f"; did you mean {near!r}?" if near else ""
    if error["type"] == "string_type" and isinstance(value, (bool, int, float)):
        message += "; put it in quotes"
    return message


def _choices(names: Any) -> str:
    return ", ".join(sorted(names))
