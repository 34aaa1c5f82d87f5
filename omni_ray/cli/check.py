"""``omni-ray check FILE``: what is wrong with a file, or what it would serve."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from omni_ray.cli.table import table
from omni_ray.config.document import Problem, dotted, read_yaml
from omni_ray.config.load import load_file
from omni_ray.config.serve_file import OmniApplication, ServeFile
from omni_ray.config.spec import ArGroup, DitGroup, Model, Pipeline
from omni_ray.errors import ConfigError
from omni_ray.plan.refusals import refusals


def check(path: str) -> int:
    """Print a line per model. Raises ConfigError, with a line per problem, if the file cannot be served."""
    file = load_file(path)
    if problems := [str(problem) for problem in _refusals(path, file)]:
        raise ConfigError("\n".join(problems))
    rows = [_row(model) for app in file.omni_applications for model in app.args.models]
    print(table(rows) if rows else f"{path}: valid, but no application in it is omni_ray's")
    return 0


def _refusals(path: str, file: ServeFile) -> Iterator[Problem]:
    """Models that no cluster can serve as the file says, where the configs of their checkpoints are on this machine."""
    document = read_yaml(Path(path))
    for i, application in enumerate(file.applications):
        if not isinstance(application, OmniApplication):
            continue
        for refusal in refusals(application.args):
            where = ("applications", i, "args", "models", refusal.index, refusal.key)
            yield Problem(*document.place(where, of_key=False), dotted(where), refusal.message, path)


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
