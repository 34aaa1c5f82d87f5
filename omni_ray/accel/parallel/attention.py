"""Attention over sequence shards, with any of diffusers' attention kernels that has a context-parallel form.

Along ``ulysses`` (DeepSpeed-Ulysses, https://arxiv.org/abs/2309.14509) ranks exchange heads for tokens, so that each
holds all tokens for its part of the heads. Along ``ring`` each rank keeps its queries and gathers all keys and values,
as Llama 3 does (https://arxiv.org/abs/2407.21783, section 3.3.2): the same bytes as in a ring that passes them around,
but one softmax, so that any kernel serves, with padding and masks. Padding is taken out before the kernel runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models import attention_dispatch

from omni_ray.accel.parallel.sequence import Sequence

KERNELS: dict[str, Callable[..., torch.Tensor]] = {}
"""Those by name that are not diffusers' own, as functions like its: context, query, key, value, mask, …"""

_ids = itertools.count()
_by_id: dict[int, ShardedAttention] = {}


@dataclass(frozen=True)
class ShardedAttention:
    """What an attention processor has in place of diffusers' ParallelConfig: its sequence and what it joins of it."""

    sequence: Sequence
    streams: tuple[str, ...]
    id: int = field(default_factory=lambda: next(_ids))

    def __post_init__(self) -> None:
        _by_id[self.id] = self

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        kernel: Callable[..., torch.Tensor],
    ) -> torch.Tensor:
        """Attention of this rank's tokens to all tokens; everything is (batch, tokens, heads, head size).

        ``mask`` says which keys of this rank are no padding, (batch, 1, 1, tokens).
        """
        self._check(query, key, mask)
        sequence = self.sequence
        valid = sequence.valid(self.streams, query.shape[1], query.device)
        qkv = self._heads_to_tokens(torch.stack((query, key, value)))
        query, (key, value) = qkv[0], sequence.ring.gather(qkv[1:], 2)
        if mask is not None:
            bits = sequence.gather(mask.view(torch.uint8) if mask.dtype == torch.bool else mask, -1)
            mask = bits.view(mask.dtype)
        if valid is not None:
            key, value = key.index_select(1, valid), value.index_select(1, valid)
            mask = None if mask is None else mask.index_select(-1, valid)
        return self._tokens_to_heads(kernel(query, key, value, mask))

    def _check(self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> None:
        if key.shape != query.shape:
            raise RuntimeError(f"parallel: {key.shape[1]} keys for {query.shape[1]} queries cannot be split over ranks")
        if mask is not None and mask.shape[1:] != (1, 1, query.shape[1]):
            raise RuntimeError(
                f"parallel: an attention mask of shape {tuple(mask.shape)} cannot be split over ranks; "
                f"only a mask of padded keys, (batch, 1, 1, {query.shape[1]}), can"
            )

    def _heads_to_tokens(self, qkv: torch.Tensor) -> torch.Tensor:
        """(3, batch, part of the tokens, heads, size) to (3, batch, tokens, part of the heads, size)."""
        ranks = self.sequence.ulysses
        parts = qkv.unflatten(3, (ranks.size, -1)).movedim(3, 0)
        return ranks.exchange(parts).movedim(0, 2).flatten(2, 3)

    def _tokens_to_heads(self, out: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, part of the heads, size) to (batch, part of the tokens, heads, size)."""
        ranks = self.sequence.ulysses
        parts = out.unflatten(1, (ranks.size, -1)).movedim(1, 0)
        return ranks.exchange(parts).movedim(0, 2).flatten(2, 3)


def _kernel(forward: Callable[..., Any], dropout_p: float, scale: float | None) -> Callable[..., torch.Tensor]:
    """A kernel of diffusers as a function of query, key, value and mask."""

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> Any:
        return forward(None, query, key, value, mask, dropout_p, False, scale, False, False, _save_ctx=False)

    return run


# One operator to the compiler: what it reads of a sequence, lengths above all, must not be compiled in.
@torch.library.custom_op(
    "omni_ray::sharded_attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor? mask, int attention, str kernel, float dropout_p, "
    "float? scale) -> Tensor",
)
def _operator(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    attention: int,
    kernel: str,
    dropout_p: float,
    scale: float | None,
) -> torch.Tensor:
    forward = KERNELS.get(kernel) or getattr(attention_dispatch, kernel)
    return _by_id[attention](query, key, value, mask, _kernel(forward, dropout_p, scale)).contiguous()


@_operator.register_fake
def _(query: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


_diffusers_attention = attention_dispatch._templated_context_parallel_attention


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    *,
    forward_op: Any,
    backward_op: Any,
    _parallel_config: Any = None,
) -> Any:
    if not isinstance(_parallel_config, ShardedAttention):
        return _diffusers_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, return_lse,
            forward_op=forward_op, backward_op=backward_op, _parallel_config=_parallel_config,
        )  # fmt: skip
    if is_causal or enable_gqa or return_lse:
        raise RuntimeError("parallel: causal and grouped attention cannot be split over ranks")
    if torch.compiler.is_compiling():
        return _operator(query, key, value, attn_mask, _parallel_config.id, forward_op.__name__, dropout_p, scale)
    return _parallel_config(query, key, value, attn_mask, _kernel(forward_op, dropout_p, scale))


# Every kernel of diffusers that can run on shards comes through this function, and a processor cannot be given
# another. So a `ShardedAttention` in place of a ParallelConfig is told apart here; diffusers' own are served as before.
attention_dispatch._templated_context_parallel_attention = _attention
