"""Attention processors that compute sharded attention, and with no kernel that cannot."""

from __future__ import annotations

import copy
from typing import Any

from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from omni_ray.accel.mixin import mixed
from omni_ray.accel.parallel.attention import ShardedAttention
from omni_ray.accel.parallel.joint import JointAttention
from omni_ray.errors import ConfigError


class ShardedProcessor:
    """Mixed into a processor's class: has a kernel of its own, and refuses one that knows of no shards.

    diffusers hands such a kernel a rank's part of the sequence as if it were the whole, and says nothing.
    """

    _backend: AttentionBackendName

    @property
    def _attention_backend(self) -> AttentionBackendName:
        return self._backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self._backend = usable_backend(backend)


def usable_backend(backend: Any) -> AttentionBackendName:
    """The kernel of this name, or diffusers' default of now for None; ConfigError if it cannot run on shards."""
    name = AttentionBackendName(backend or _AttentionBackendRegistry.get_active_backend()[0])
    if not _AttentionBackendRegistry._is_context_parallel_available(name):
        usable = ", ".join(sorted(_AttentionBackendRegistry._supports_context_parallel))
        raise ConfigError(
            f"attention.backend {name.value!r} cannot run on parts of a sequence; with ulysses or ring, use one of "
            f"{usable}"
        )
    return name


def check_processor(processor: Any, transformer: str, processors: tuple[str, ...]) -> None:
    """ConfigError if it is none of the family's ``processors``, or its kernel cannot run on shards."""
    if type(processor).__name__ not in processors:
        raise ConfigError(
            f"parallel: an attention of {transformer} has the processor {type(processor).__name__}, which cannot run "
            f"on parts of a sequence, unlike {', '.join(processors)}; set ulysses: 1 and ring: 1"
        )
    usable_backend(getattr(processor, "_attention_backend", None))


def sharded(processor: Any, attention: ShardedAttention) -> Any:
    """A processor like this one that computes ``attention``. A new one, for the modules may share one."""
    found = JointAttention() if type(processor).__name__ == "JointAttnProcessor2_0" else copy.copy(processor)
    backend = found._attention_backend
    found.__class__ = mixed(ShardedProcessor, type(found))
    found.__dict__.pop("_attention_backend", None)
    found._attention_backend = backend
    found._parallel_config = attention
    return found
