"""Hooks that cut the sequence in the forward of a transformer and join it again, at the modules of a family's plan."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.hooks import ModelHook
from diffusers.models._modeling_parallel import ContextParallelInput

from omni_ray.accel.parallel.sequence import Sequence
from omni_ray.config.catalog import SequencePlan, Split


class SplitHook(ModelHook):  # type: ignore[misc]
    """Gives a module the shards of its arguments, or cuts its outputs into shards."""

    def __init__(
        self,
        sequence: Sequence,
        inputs: Mapping[str, Split],
        outputs: Mapping[int, Split] | None = None,
        length: str = "",
    ) -> None:
        super().__init__()
        self.sequence = sequence
        self.inputs = inputs
        self.outputs = outputs or {}
        self.length = length
        self.parameters: list[str] = []

    def initialize_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        self.parameters = list(inspect.signature(type(module).forward).parameters)[1:]
        return module

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = dict(zip(self.parameters, args, strict=False)) | kwargs
        shards = self.shards(given, self.inputs)
        if self.length:
            shards[self.length] = self.sequence.shard_length(given[self.length])
        positional = tuple(shards.get(name, x) for name, x in zip(self.parameters, args, strict=False))
        return positional, {name: shards.get(name, x) for name, x in kwargs.items()}

    def shards(self, given: Mapping[str, Any], inputs: Mapping[str, Split]) -> dict[str, Any]:
        """This rank's shards of those of the ``given`` arguments that ``inputs`` says to split."""
        return {
            name: self._shard(given[name], split, name, given)
            for name, split in inputs.items()
            if given.get(name) is not None
        }

    def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
        if not self.outputs:
            return output
        if isinstance(output, torch.Tensor):
            return self._shard(output, self.outputs[0], "", {})
        parts = enumerate(output)
        return tuple(self._shard(x, self.outputs[i], "", {}) if i in self.outputs else x for i, x in parts)

    def _shard(self, x: torch.Tensor, split: Split, name: str, given: Mapping[str, Any]) -> torch.Tensor:
        if x.dim() != split.ndim:
            if split.optional:
                return x
            raise RuntimeError(
                f"parallel: {name or split.stream} has the shape {tuple(x.shape)}, but {split.ndim} dimensions are "
                "needed to split it over ranks; this call of the transformer cannot be split"
            )
        length = x.shape[split.dim]
        stream = split.stream or name
        if not split.tail:
            self.sequence.lengths[stream] = length
            return self.sequence.shard(x, split.dim)
        tail = int(given[split.tail])
        self.sequence.lengths[stream], self.sequence.lengths["history"] = tail, length - tail
        parts = x.split([length - tail, tail], split.dim)
        return torch.cat([self.sequence.shard(part, split.dim) for part in parts], split.dim)


class GatherHook(ModelHook):  # type: ignore[misc]
    """Joins the shards of a module's output, (batch, tokens, channels)."""

    def __init__(self, sequence: Sequence, stream: str) -> None:
        super().__init__()
        self.sequence = sequence
        self.stream = stream

    def post_forward(self, module: torch.nn.Module, output: torch.Tensor) -> torch.Tensor:
        return self.sequence.unshard(output, 1, self.sequence.lengths[self.stream])


def plan_hooks(sequence: Sequence, plan: SequencePlan, transformer: Any) -> list[tuple[str, ModelHook]]:
    """The hooks of a plan and the paths of their modules. Of two hooks of a module, the later wraps the earlier."""
    if plan.inputs is None:
        return [(path, _from_diffusers(sequence, step)) for path, step in transformer._cp_plan.items()]
    return [
        *((path, SplitHook(sequence, {}, outputs)) for path, outputs in plan.outputs.items()),
        *(
            (path, SplitHook(sequence, inputs, length=plan.lengths.get(path, "")))
            for path, inputs in plan.inputs.items()
        ),
        *((path, GatherHook(sequence, stream)) for path, stream in plan.gather.items()),
    ]


def _from_diffusers(sequence: Sequence, step: Any) -> ModelHook:
    """A step of a ``_cp_plan``: what to split by arguments or outputs, or the one output to gather."""
    if isinstance(step, dict) and all(isinstance(split, ContextParallelInput) for split in step.values()):
        splits = {key: Split(split.split_dim, split.expected_dims) for key, split in step.items()}
        outputs = {key: split for key, split in splits.items() if isinstance(key, int)}
        return SplitHook(sequence, {key: splits[key] for key in splits if isinstance(key, str)}, outputs)
    if getattr(step, "gather_dim", None) == 1:
        return GatherHook(sequence, "hidden_states")
    raise NotImplementedError(f"diffusers' context-parallel step {step!r} is of an unknown kind")
