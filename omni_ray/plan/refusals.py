"""What a group cannot be spread over, whatever the nodes: axes that its model lacks, heads that do not divide."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from omni_ray.config import catalog
from omni_ray.config.spec import ArGroup, DitGroup, OmniSpec, Pipeline
from omni_ray.errors import ConfigError
from omni_ray.plan.checkpoint import Checkpoint, Component, is_here, read_checkpoint
from omni_ray.plan.language import Language, language
from omni_ray.plan.transformers import transformer


@dataclass(frozen=True)
class Refusal:
    """Why a group cannot be served. ``key`` is the key of the model at ``index`` that it is about.

    ``is_final``: nodes that join the cluster later change nothing.
    """

    index: int
    key: str
    message: str
    is_final: bool = False

    def __str__(self) -> str:
        return f"models[{self.index}].{self.key}: {self.message}"


def refusals(spec: OmniSpec) -> list[Refusal]:
    """Why groups cannot be served on any nodes; of groups whose configs are not on this machine nothing is known."""
    found: list[Refusal] = []
    for index, model in enumerate(spec.models):
        if isinstance(model, Pipeline) or not is_here(model.source):
            continue
        try:
            found += group_refusals(index, model, read_checkpoint(model.source))
        except ConfigError as error:
            found.append(Refusal(index, "source", error.message, is_final=True))
        except (KeyError, TypeError, ValueError) as error:
            message = f"a config.json of {model.source!r} lacks what its kind needs: {error!r}"
            found.append(Refusal(index, "source", message, is_final=True))
    return found


def group_refusals(index: int, group: ArGroup | DitGroup, checkpoint: Checkpoint) -> list[Refusal]:
    """Why the group's model cannot be spread as ``parallel`` asks; empty where it can."""
    if isinstance(group, ArGroup):
        if checkpoint.pipeline:
            return [_wrong_type(index, f"{checkpoint.pipeline}, a diffusers pipeline", "dit")]
        component = checkpoint.components[0]
        model = language(component.config, component.cls)
        messages = list(_ar_refusals(group, model)) if model else []
        return [Refusal(index, "parallel", message, is_final=True) for message in messages]
    if not checkpoint.pipeline:
        return [_wrong_type(index, f"{checkpoint.components[0].cls or 'no diffusers pipeline'}", "ar")]
    messages = []
    for part in checkpoint.components:
        if part.library == "diffusers" and "Transformer" in part.cls:
            messages += catalog.refusals(part.cls, _with_heads(part), group.parallel)
    unique = dict.fromkeys(message.removeprefix("parallel: ") for message in messages)
    found = [Refusal(index, "parallel", message, is_final=True) for message in unique]
    return [*found, *(Refusal(index, key, message, is_final=True) for key, message in _levers(group, checkpoint))]


def _levers(group: DitGroup, checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """What the transformers cannot do, and components that are not there: key and message."""
    names = {part.name for part in checkpoint.components}
    for key, chosen in (("components", group.quantization.components or ()), ("files", group.quantization.files)):
        if unknown := sorted(set(chosen) - names):
            has = ", ".join(sorted(names))
            yield f"quantization.{key}", f"{checkpoint.pipeline} has no {', '.join(unknown)}; choose from {has}"
    for cls in dict.fromkeys(part.cls for part in checkpoint.components if "Transformer" in part.cls):
        family = catalog.FAMILIES.get(cls)
        if group.cache.kind in ("teacache", "both") and not (family and family.stacks):
            known = ", ".join(sorted(name for name, each in catalog.FAMILIES.items() if each.stacks))
            yield "cache.kind", f"TeaCache does not know {cls}, but {known}; set kind: cache_dit or none"
        if group.cache.kind in ("cache_dit", "both") and family and not family.has_cache_dit:
            yield "cache.kind", f"cache-dit has no adapter for {cls}; set kind: teacache or none"
        if group.attention.fused_qkv and not (family and family.has_fused_qkv):
            yield "attention.fused_qkv", f"{cls} has no projections to fuse; remove the key"


def _with_heads(part: Component) -> dict[str, Any]:
    """The config, with the number of heads where it is the class's default and so not written down."""
    family, model = catalog.FAMILIES.get(part.cls), transformer({**part.config, "_class_name": part.cls})
    return {family.heads: model.num_heads, **part.config} if family and model else part.config


def _wrong_type(index: int, what: str, type_: str) -> Refusal:
    return Refusal(index, "source", f"it is {what}; set type: {type_}, or name another source", is_final=True)


def _ar_refusals(group: ArGroup, model: Language) -> Iterator[str]:
    tensor, pipeline = group.parallel.tensor, group.parallel.pipeline
    if model.num_heads % tensor:
        yield (
            f"tensor {tensor} does not divide the {model.num_heads} attention heads; "
            f"take {_listed(_divisors(model.num_heads, tensor))}"
        )
    elif model.num_kv_heads % tensor and tensor % model.num_kv_heads:
        yield (
            f"tensor {tensor} and the {model.num_kv_heads} key-value heads: neither divides the other; "
            f"take {_listed(_divisors(model.num_kv_heads, tensor))}"
        )
    if pipeline > model.num_layers:
        yield f"pipeline {pipeline} is more than the {model.num_layers} layers; lower it"


def _divisors(number: int, near: int) -> list[int]:
    """The largest divisor below ``near`` and the smallest above."""
    below = max(each for each in range(1, near) if number % each == 0)
    above = next((each for each in range(near + 1, number + 1) if number % each == 0), None)
    return [below] if above is None else [below, above]


def _listed(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))
