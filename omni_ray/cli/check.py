"""``omni-ray check FILE``: what is wrong with a file, or what it would serve."""

from __future__ import annotations

from omni_ray.cli.table import table
from omni_ray.config.load import load
from omni_ray.config.spec import ArGroup, DitGroup, Model, Pipeline


def check(path: str) -> int:
    """Print a line per model. Raises ConfigError, with a line per problem, if the file cannot be served."""
    rows = [_row(model) for spec in load(path) for model in spec.models]
    print(table(rows) if rows else f"{path}: valid, but no application in it is omni_ray's")
    return 0


def _row(model: Model) -> tuple[str, ...]:
    if isinstance(model, Pipeline):
        return model.id, model.type, f"{model.rewrite} -> {model.generate}", ""
    return model.id, model.type, model.source, f"{_replicas(model)} x {_count(model.parallel.num_ranks, 'rank')}"


def _replicas(group: ArGroup | DitGroup) -> str:
    bounds = group.autoscaling
    if bounds is None:
        return _count(group.num_replicas, "replica")
    return f"{bounds.min_replicas} to {_count(bounds.max_replicas, 'replica')}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"
