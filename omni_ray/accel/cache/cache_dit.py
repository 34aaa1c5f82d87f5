"""Cache-DiT beneath the gate: DBCache, TaylorSeer and step masks of the cache-dit library, for interleaved requests.

The library keeps what it knows of a run in contexts, one for each list of blocks. Here each guidance branch of each
request has contexts of its own, which are put in place for its forwards: so nothing is mixed, and no call is told from
the other branch's by counting. Requests do not share a forward, since they would share the decision.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

from omni_ray.accel.cache.stacks import Stacks
from omni_ray.config.spec import CacheDitOptions
from omni_ray.errors import ConfigError

os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "WARNING")  # read when it is imported

Contexts = dict[str, Any]
"""What one branch of one request keeps of one transformer: the library's contexts by name."""


class CacheDit:
    """Enables the cache on transformers, of which each has an adapter of `adapt`.

    ``stacks`` are those whose streams are cut at the first block.
    """

    def __init__(self, spec: CacheDitOptions, adapters: Mapping[str, Any], stacks: Mapping[str, Stacks]) -> None:
        import cache_dit  # type: ignore[import-untyped]

        self._spec = spec
        self._stacks = stacks
        self._ranks = _Ranks(None)
        self._managers: dict[str, Any] = {}
        self._templates: dict[str, dict[str, dict[str, Any]]] = {}
        options = spec.model_dump(exclude={"taylorseer_order", "steps_mask"})
        taylor = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=spec.taylorseer_order)
        for name, adapter in adapters.items():
            cache_dit.enable_cache(
                adapter,
                cache_config=cache_dit.DBCacheConfig(enable_separate_cfg=False, **options),
                calibrator_config=taylor if spec.taylorseer_order else None,
            )
            manager = self._managers[name] = adapter.pipe._context_manager
            contexts = manager._cached_context_manager
            self._templates[name] = {key: context._init_kwargs for key, context in contexts.items()}

    def compare_within(self, group: dist.ProcessGroup) -> None:
        """Average what is compared over the ranks of ``group``, which compute the same calls, in place of all ranks."""
        from cache_dit.caching.cache_contexts import cache_manager  # type: ignore[import-untyped]

        self._ranks = cache_manager.dist = _Ranks(group)

    @contextmanager
    def comparing_everywhere(self) -> Iterator[None]:
        """All ranks compute parts of one call, and decide about it together."""
        group, self._ranks.group = self._ranks.group, None
        try:
            yield
        finally:
            self._ranks.group = group

    @property
    def names(self) -> list[str]:
        return list(self._managers)

    def contexts(self, name: str, num_steps: int) -> Contexts:
        """New ones, for a request of ``num_steps`` steps."""
        manager = self._managers[name]
        made: Contexts = {}
        manager._cached_context_manager = made
        for template in self._templates[name].values():
            manager.new_context(**self._arguments(template, num_steps))
        return made

    def _arguments(self, template: Mapping[str, Any], num_steps: int) -> dict[str, Any]:
        import cache_dit

        arguments = copy.deepcopy(dict(template))
        arguments["cache_config"].num_inference_steps = num_steps
        if self._spec.steps_mask:
            mask = cache_dit.steps_mask(total_steps=num_steps, mask_policy=self._spec.steps_mask)
            arguments["cache_config"].steps_computation_mask = mask
        return arguments

    @contextmanager
    def using(self, name: str, contexts: Contexts) -> Iterator[list[bool]]:
        """Put ``contexts`` in place. Afterwards the list says whether the forward was answered from them."""
        skipped: list[bool] = []
        before = _executed(contexts)
        manager = self._managers[name]
        manager._cached_context_manager = contexts
        try:
            with self._stacks[name].entered() if name in self._stacks else nullcontext():
                yield skipped
        finally:  # lest it keeps the tensors of a request that has ended
            manager._cached_context_manager, manager._current_context = {}, None
        if _executed(contexts) != before:
            skipped.append(all(each.get_current_step() in each.cached_steps for each in contexts.values()))


def adapt(name: str, transformer: Any, spec: CacheDitOptions) -> Any:
    """The library's adapter for a transformer. It may replace the transformer's forward.

    Raises ConfigError where the library has none, or the transformer has too few blocks.
    """
    from cache_dit import BlockAdapter
    from cache_dit.caching.block_adapters import BlockAdapterRegister  # type: ignore[import-untyped]

    kind = type(transformer).__name__
    adapter = BlockAdapterRegister.get_adapter(transformer)
    if adapter is None:
        raise ConfigError(f"cache.kind cache_dit: cache-dit has no adapter for {kind} ({name}); set kind: none")
    adapter = BlockAdapter.normalize(adapter)
    for blocks, label in zip(adapter.blocks[0], adapter.blocks_name[0], strict=True):
        wanted = spec.Fn_compute_blocks + spec.Bn_compute_blocks
        if wanted > len(blocks):
            raise ConfigError(
                f"cache.cache_dit: Fn_compute_blocks {spec.Fn_compute_blocks} + Bn_compute_blocks "
                f"{spec.Bn_compute_blocks} = {wanted}, but {label} of {kind} has {len(blocks)} blocks; lower them"
            )
    return adapter


class _Ranks:
    """Stands where the library has ``torch.distributed``: what it compares is averaged over ``group``."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group

    def all_reduce(self, x: torch.Tensor, op: Any) -> None:
        dist.all_reduce(x, op, group=self.group)

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)


def _executed(contexts: Contexts) -> list[int]:
    return [each.transformer_executed_steps for each in contexts.values()]
