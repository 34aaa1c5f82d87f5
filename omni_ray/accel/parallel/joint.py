"""SD3's joint attention by way of diffusers' attention dispatch, so that it can run on sequence shards.

diffusers' own processor (`JointAttnProcessor2_0`) calls PyTorch's attention itself, which knows of no shards.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn


class JointAttention:
    """Computes what `JointAttnProcessor2_0` does: image tokens first, then text tokens, if there are any."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> Any:
        if attention_mask is not None:
            raise RuntimeError("parallel: SD3's attention takes no mask; remove attention_mask")
        qkv = _heads(attn, hidden_states, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))
        if encoder_hidden_states is not None:
            added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            text = _heads(attn, encoder_hidden_states, added, (attn.norm_added_q, attn.norm_added_k))
            qkv = [torch.cat(pair, dim=1) for pair in zip(qkv, text, strict=True)]
        out = dispatch_attention_fn(*qkv, backend=self._attention_backend, parallel_config=self._parallel_config)
        out = out.flatten(2, 3).to(qkv[0].dtype)
        image, text_out = out[:, : hidden_states.shape[1]], out[:, hidden_states.shape[1] :]
        image = attn.to_out[0](image)
        if encoder_hidden_states is None:
            return image
        return image, text_out if attn.context_pre_only else attn.to_add_out(text_out)


def _heads(attn: Any, x: torch.Tensor, projections: tuple[Any, ...], norms: tuple[Any, Any]) -> list[torch.Tensor]:
    """Query, key and value of ``x``, each (batch, tokens, heads, head size)."""
    qkv = [project(x).unflatten(-1, (attn.heads, -1)) for project in projections]
    return [x if norm is None else norm(x) for x, norm in zip(qkv, (*norms, None), strict=True)]
