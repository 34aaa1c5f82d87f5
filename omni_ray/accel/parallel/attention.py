"""Attention over sequence shards, with any of diffusers' attention kernels that has a context-parallel form.

Ulysses (https://arxiv.org/abs/2309.14509): ranks exchange heads for tokens, so that each holds the whole sequence for
its part of the heads. Padding is taken out of the keys before the kernel runs, so that no mask is needed for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models import attention_dispatch

from omni_ray.accel.parallel.sequence import Sequence


@dataclass(frozen=True)
class ShardedAttention:
    """What an attention processor has in place of diffusers' ParallelConfig: its sequence and what it joins of it."""

    sequence: Sequence
    streams: tuple[str, ...]

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        kernel: Callable[..., torch.Tensor],
    ) -> torch.Tensor:
        """Attention of this rank's tokens to all tokens; everything is (batch, tokens, heads, head size)."""
        sequence = self.sequence
        if key.shape != query.shape:
            raise RuntimeError(f"parallel: {key.shape[1]} keys for {query.shape[1]} queries cannot be split over ranks")
        if mask is not None and mask.shape[1:] != (1, 1, query.shape[1]):
            raise RuntimeError(
                f"parallel: an attention mask of shape {tuple(mask.shape)} cannot be split over ranks; "
                f"only a mask of padded keys, (batch, 1, 1, {query.shape[1]}), can"
            )
        valid = sequence.valid(self.streams, query.shape[1], query.device)
        query, key, value = self._heads_to_tokens(torch.stack((query, key, value)))
        key, value = sequence.ring.gather(key, 1), sequence.ring.gather(value, 1)
        if mask is not None:
            mask = (
                sequence.gather(mask.to(torch.uint8), -1).bool()
                if mask.dtype == torch.bool
                else sequence.gather(mask, -1)
            )
        if valid is not None:
            key, value = key.index_select(1, valid), value.index_select(1, valid)
            mask = None if mask is None else mask.index_select(-1, valid)
        return self._tokens_to_heads(kernel(query, key, value, mask))

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

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> Any:
        return forward_op(None, query, key, value, mask, dropout_p, False, scale, False, False, _save_ctx=False)

    return _parallel_config(query, key, value, attn_mask, kernel)


# Every kernel of diffusers that can run on shards comes through this function, and a processor cannot be given
# another. So a `ShardedAttention` in place of a ParallelConfig is told apart here; diffusers' own are served as before.
attention_dispatch._templated_context_parallel_attention = _attention
