"""Prints the table of every knob, made from the spec: ``python -m omni_ray.config.docs > docs/configuration.md``."""

from __future__ import annotations

from collections.abc import Iterator
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from omni_ray.config.keys import ApiKey
from omni_ray.config.spec import Api, ArGroup, Block, DitGroup, Group, Pipeline

HEAD = """\
# Configuration

Made from `omni_ray/config/spec.py` by `make docs`; edit that, not this.

A file is a [Ray Serve config](https://docs.ray.io/en/latest/serve/production-guide/config.html). What is ours is the
`args` of an application whose `import_path` is `omni_ray.app:build`: a list of `models`, and `api`.

```yaml
http_options: {host: 127.0.0.1, port: 8000}
applications:
  - name: omni
    route_prefix: /
    import_path: omni_ray.app:build
    args:
      models:
        - name: qwen
          type: ar
          source: Qwen/Qwen3-8B
          parallel: {tensor: 2}
      api: {num_replicas: 2}
```

A dot in a key is a block within: `parallel.tensor` is the `tensor: 2` above. Unknown keys are refused, and so are the
values marked as not supported yet. `omni-ray check FILE` says where, without starting anything.
"""

INTRO = {
    "Every `ar` and `dit` model": "Each entry of `models` is a group of replicas.",
    "`ar` models": "Autoregressive models (LLMs, VLMs) on vLLM.",
    "`dit` models": "Diffusion transformers (image, video) on diffusers.",
    "`pipeline` models": "A chain: an `ar` model rewrites what a person says, a `dit` model draws it.",
    "`api`": "The HTTP edge.",
    "The keys file": (
        "What `api.keys_file` names: a YAML or JSON file with a list of `keys`. `omni-ray key NAME` makes a key and "
        "its line. `/health`, `/ready`, `/docs` and `/openapi.json` need no key; everything else does, `/metrics` "
        "too: give Prometheus one with `models: []`. The router counts, so that limits hold over all ingress replicas; "
        "it starts afresh when it is restarted."
    ),
}
BOUNDS = {"Ge": ("≥", "ge"), "Gt": (">", "gt"), "Le": ("≤", "le"), "Lt": ("<", "lt")}


def document() -> str:
    """The whole page, as Markdown."""
    common = set(Group.model_fields)
    rows = {
        "Every `ar` and `dit` model": list(_rows(Group)),
        "`ar` models": list(_rows(ArGroup, without=common)),
        "`dit` models": list(_rows(DitGroup, without=common)),
        "`pipeline` models": list(_rows(Pipeline)),
        "`api`": list(_rows(Api)),
        "The keys file": list(_rows(ApiKey, "keys[].")),
    }
    return HEAD + "".join(f"\n## {title}\n\n{INTRO[title]}\n\n{_table(rows[title])}" for title in rows)


def _table(rows: list[tuple[str, ...]]) -> str:
    lines = [("Key", "Type", "Default", "Meaning"), ("---",) * 4, *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _rows(
    block: type[Block], prefix: str = "", without: frozenset[str] | set[str] = frozenset()
) -> Iterator[tuple[str, ...]]:
    for name, field in block.model_fields.items():
        if name in without:
            continue
        inner = next((kind for kind in _kinds(field.annotation) if _is_block(kind)), None)
        if inner is None:
            meaning = (field.description or "") + _unsupported(block, name, field)
            yield f"`{prefix}{name}`", _type(field), _default(field), meaning
        else:
            if NoneType in _kinds(field.annotation):
                yield f"`{prefix}{name}`", "block or null", _default(field), field.description or ""
            yield from _rows(inner, f"{prefix}{name}.")


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; anything else is the only member of itself."""
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    if get_origin(annotation) in (None, Literal, list, dict):
        return (annotation,)
    return tuple(kind for member in get_args(annotation) for kind in _kinds(member))


def _is_block(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Block)


def _type(field: FieldInfo) -> str:
    names = []
    for kind in _kinds(field.annotation):
        if get_origin(kind) is Literal:
            names.append(" or ".join(f"`{value}`" for value in get_args(kind)))
        elif kind is NoneType:
            names.append("null")
        else:
            kind = Annotated if get_origin(kind) is list else kind
            names.append(
                {Annotated: "list of text", str: "text", bool: "true or false", int: "integer", float: "number"}.get(
                    kind, "mapping"
                )
            )
    bounds = [
        f"{BOUNDS[kind][0]} {getattr(each, BOUNDS[kind][1])}"
        for each in field.metadata
        if (kind := type(each).__name__) in BOUNDS
    ]
    return " or ".join(names) + (f", {', '.join(bounds)}" if bounds else "")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True, validated_data={})
    if default is None:
        return "null"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def _unsupported(block: type[Block], name: str, field: FieldInfo) -> str:
    """The choices that the block's own validator refuses."""
    refused = []
    for choice in (
        value for kind in _kinds(field.annotation) if get_origin(kind) is Literal for value in get_args(kind)
    ):
        try:
            block.__pydantic_validator__.validate_assignment(block.model_construct(), name, choice)
        except ValidationError as error:
            refused += [
                f"`{choice}`" for each in error.errors() if each["loc"] == (name,) and each["type"] == "value_error"
            ]
    return f" Not supported yet: {', '.join(refused)}." if refused else ""


if __name__ == "__main__":
    print(document(), end="")
