"""Language models, served or used as text encoders: from their ``config.json`` to parameters and KV cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from omni_ray.plan.linear import Linear, total

Config = dict[str, Any]


@dataclass(frozen=True)
class Language:
    """A language model. ``layer`` holds the linear layers of one block, an expert's counted once per expert.

    ``num_active_weights`` are the weights that one token is multiplied with, ``num_other_params`` those outside the
    blocks and the tables: norms, a vision tower.
    """

    hidden: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn: int
    max_len: int
    num_layer_params: int
    num_embed_params: int
    num_head_params: int
    num_other_params: int
    num_active_weights: int

    @property
    def num_params(self) -> int:
        tables = self.num_embed_params + self.num_head_params
        return self.num_layers * self.num_layer_params + tables + self.num_other_params

    @property
    def num_kv_values(self) -> int:
        """Numbers that the KV cache holds per token and layer."""
        return 2 * self.num_kv_heads * self.head_dim


def language(config: Config, cls: str = "") -> Language | None:
    """The model of a config, built as ``cls``, or as its first architecture; None where the kind is not known here."""
    cls = cls or next(iter(config.get("architectures") or ()), "")
    build = KINDS.get(config.get("model_type", ""))
    return build(config, cls) if build else None


def of_weights(config: Config, cls: str, num_params: int) -> Language | None:
    """A decoder of a kind that is not known here, of which the weights are: blocks of the usual keys, scaled to them.

    None where the config lacks those keys, or says that the KV cache is of another sort.
    """
    text: Config = config.get("text_config", config)
    if "kv_lora_rank" in text or not num_params or not text.keys() >= USUAL_KEYS:
        return None
    model = decoder(text, cls)
    blocks = num_params - model.num_embed_params - model.num_head_params
    return dataclasses.replace(
        model,
        num_layer_params=blocks // model.num_layers,
        num_other_params=blocks % model.num_layers,
        num_active_weights=model.num_active_weights * num_params // model.num_params,
    )


USUAL_KEYS = {"hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"}


def decoder(config: Config, cls: str) -> Language:
    """Llama, Qwen2, Qwen3, Mistral and what else has their blocks, dense or a mixture of experts."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or config.get("attention_head_dim") or hidden // heads
    kind = config.get("model_type", "")
    bias = kind.startswith(("qwen2", "qwen2_5")) or bool(config.get("attention_bias"))
    attention = [
        Linear(hidden, heads * head_dim, 1, bias),
        Linear(hidden, kv_heads * head_dim, 2, bias),
        Linear(heads * head_dim, hidden, 1, bool(config.get("attention_bias"))),
    ]
    experts, active, ffn = _experts(config)
    mlp = 3 * hidden * ffn
    router = hidden * experts if experts > 1 else 0
    dense = 3 * hidden * _first(config["intermediate_size"]) * _num_shared(config)
    has_norms = kind.startswith(("qwen3", "hunyuan"))
    norms = 2 * hidden + (2 * head_dim if has_norms else 0)
    table = config["vocab_size"] * hidden
    has_head = "For" in cls and not config.get("tie_word_embeddings", kind.startswith("qwen3_vl"))
    return Language(
        hidden=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=ffn * active,
        max_len=config.get("max_position_embeddings", 4096),
        num_layer_params=total(attention) + mlp * experts + router + dense + norms,
        num_embed_params=table,
        num_head_params=table if has_head else 0,
        num_other_params=hidden,
        num_active_weights=layers * (total(attention) + mlp * active + router + dense) + table,
    )


def _experts(config: Config) -> tuple[int, int, int]:
    """Number of experts, how many of them a token takes, and their width; a dense model has one."""
    experts = _first(config.get("num_experts") or config.get("num_local_experts") or 1)
    if experts == 1:
        return 1, 1, _first(config["intermediate_size"])
    active = _first(config.get("num_experts_per_tok") or config.get("moe_topk"))
    return experts, active, _first(config.get("moe_intermediate_size") or config["intermediate_size"])


def _num_shared(config: Config) -> int:
    """Experts that every token takes, of the dense width."""
    return _first(config.get("num_shared_expert") or 0) if config.get("use_mixed_mlp_moe") else 0


def _first(value: Any) -> int:
    """A number that some configs give once per layer."""
    return int(value[0] if isinstance(value, list) else value)


def qwen2_5_vl(config: Config, cls: str) -> Language:
    """A Qwen2 decoder and a vision tower."""
    text = {**config, **config.get("text_config", {}), "model_type": "qwen2"}
    vision = config.get("vision_config", {})
    width, out = vision.get("hidden_size", 3584), vision.get("out_hidden_size", 3584)
    ffn, merged = vision.get("intermediate_size", 3420), width * vision.get("spatial_merge_size", 2) ** 2
    patch = vision.get("in_channels", 3) * vision.get("temporal_patch_size", 2) * vision.get("patch_size", 14) ** 2
    block = total([Linear(width, 3 * width), Linear(width, width), Linear(width, ffn, 2), Linear(ffn, width)])
    tower = vision.get("depth", 32) * (block + 2 * width) + patch * width
    merger = width + total([Linear(merged, merged), Linear(merged, out)])
    return _with_tower(decoder(text, cls), tower + merger)


def mistral3(config: Config, cls: str) -> Language:
    """A Mistral decoder and a Pixtral vision tower."""
    text = {**config.get("text_config", {}), "model_type": "mistral"}
    text["tie_word_embeddings"] = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    vision = config.get("vision_config", {})
    width, ffn = vision.get("hidden_size", 1024), vision.get("intermediate_size", 4096)
    patch = vision.get("num_channels", 3) * vision.get("patch_size", 16) ** 2
    block = 4 * width * width + 3 * width * ffn + 2 * width
    tower = vision.get("num_hidden_layers", 24) * block + patch * width + width
    merge, hidden = config.get("spatial_merge_size", 2) ** 2, text["hidden_size"]
    bias = bool(config.get("multimodal_projector_bias"))
    projector = width + merge * width * width + total([Linear(width, hidden, 1, bias), Linear(hidden, hidden, 1, bias)])
    return _with_tower(decoder(text, cls), tower + projector)


def _with_tower(text: Language, num_params: int) -> Language:
    return dataclasses.replace(text, num_other_params=text.num_other_params + num_params)


def t5(config: Config, cls: str) -> Language:
    """The encoder of T5 and UMT5; UMT5 has a table of relative positions in every block."""
    hidden, layers, heads = config.get("d_model", 512), config.get("num_layers", 6), config.get("num_heads", 8)
    inner, ffn = heads * config.get("d_kv", 64), config.get("d_ff", 2048)
    gated = config.get("feed_forward_proj", _t5_activation(config)).startswith("gated")
    positions = config.get("relative_attention_num_buckets", 32) * heads
    in_every_block = config.get("model_type") == "umt5"
    block = 4 * hidden * inner + (3 if gated else 2) * hidden * ffn
    norms = 2 * hidden + (positions if in_every_block else 0)
    return Language(
        hidden=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=config.get("d_kv", 64),
        ffn=ffn,
        max_len=512,
        num_layer_params=block + norms,
        num_embed_params=config.get("vocab_size", 32128) * hidden,
        num_head_params=0,
        num_other_params=hidden + (0 if in_every_block else positions),
        num_active_weights=layers * block,
    )


def _t5_activation(config: Config) -> str:
    return "gated-gelu" if config.get("model_type") == "umt5" else "relu"


def clip_text(config: Config, cls: str) -> Language:
    """CLIP's text model, with or without its projection."""
    text = config.get("text_config", config)
    hidden, layers = text.get("hidden_size", 512), text.get("num_hidden_layers", 12)
    ffn, length = text.get("intermediate_size", 2048), text.get("max_position_embeddings", 77)
    block = total([Linear(hidden, hidden, 4), Linear(hidden, ffn), Linear(ffn, hidden)])
    projection = hidden * text.get("projection_dim", 512) if cls.endswith("WithProjection") else 0
    heads = text.get("num_attention_heads", 8)
    return Language(
        hidden=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        ffn=ffn,
        max_len=length,
        num_layer_params=block + 4 * hidden,
        num_embed_params=text.get("vocab_size", 49408) * hidden,
        num_head_params=0,
        num_other_params=length * hidden + 2 * hidden + projection,
        num_active_weights=layers * block,
    )


KINDS: dict[str, Callable[[Config, str], Language]] = {
    "llama": decoder,
    "mistral": decoder,
    "qwen2": decoder,
    "qwen3": decoder,
    "qwen3_moe": decoder,
    "hunyuan_image_3_moe": decoder,
    "qwen2_5_vl": qwen2_5_vl,
    "mistral3": mistral3,
    "t5": t5,
    "umt5": t5,
    "clip_text_model": clip_text,
    "clip": clip_text,
}
