"""The diffusion transformers that the plan knows, each from its ``config.json`` to its linear layers.

The layers and their names are those of diffusers' models; tests build each model on torch's meta device and compare.
Tensor parallelism divides attention, feed-forward and what of the modulation the catalog names; embeddings and norms
are on every rank.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from omni_ray.plan.linear import Attention, Linear, Tokens, Transformer

Config = dict[str, Any]


def transformer(config: Config) -> Transformer | None:
    """The layers of a transformer's config; None where its ``_class_name`` is not known here."""
    build = FAMILIES.get(config.get("_class_name", ""))
    return build(config) if build else None


def _attention(hidden: int, times: int, tokens: Tokens, bias: bool = True) -> list[Linear]:
    """Query, key and value projections, and the one behind them."""
    return [
        Linear(hidden, hidden, 3 * times, bias, tokens, "columns"),
        Linear(hidden, hidden, times, bias, tokens, "rows"),
    ]


def _mlp(hidden: int, ffn: int, times: int, tokens: Tokens) -> list[Linear]:
    return [
        Linear(hidden, ffn, times, True, tokens, "columns"),
        Linear(ffn, hidden, times, True, tokens, "rows"),
    ]


def _swiglu(hidden: int, ffn: int, times: int, tokens: Tokens) -> list[Linear]:
    return [
        Linear(hidden, 2 * ffn, times, False, tokens, "columns"),
        Linear(ffn, hidden, times, False, tokens, "rows"),
    ]


def _vector(inputs: int, hidden: int, times: int = 1, bias: bool = True) -> list[Linear]:
    """A two-layer embedding of one vector: a timestep, a guidance scale, a pooled prompt."""
    return [Linear(inputs, hidden, times, bias), Linear(hidden, hidden, times, bias)]


def flux(config: Config) -> Transformer:
    """FLUX.1: blocks of two streams, then blocks of one."""
    heads, head = config.get("num_attention_heads", 24), config.get("attention_head_dim", 128)
    hidden, channels = heads * head, config.get("in_channels", 64)
    out = (config.get("out_channels") or channels) * config.get("patch_size", 1) ** 2
    double, single = config.get("num_layers", 19), config.get("num_single_layers", 38)
    linears = [
        *_vector(256, hidden, 2 if config.get("guidance_embeds") else 1),
        *_vector(config.get("pooled_projection_dim", 768), hidden),
        Linear(config.get("joint_attention_dim", 4096), hidden, tokens="text"),
        Linear(channels, hidden, tokens="image"),
        Linear(hidden, 6 * hidden, 2 * double, split="columns"),
        *(layer for tokens in STREAMS for layer in _attention(hidden, double, tokens)),
        *(layer for tokens in STREAMS for layer in _mlp(hidden, 4 * hidden, double, tokens)),
        Linear(hidden, 3 * hidden, single, split="columns"),
        Linear(hidden, 3 * hidden, single, True, "all", "columns"),
        Linear(hidden, 4 * hidden, single, True, "all", "columns"),
        Linear(5 * hidden, hidden, single, True, "all", "rows"),
        Linear(hidden, 2 * hidden),
        Linear(hidden, out, tokens="image"),
    ]
    attentions = (Attention(hidden, "all", "all", double + single),)
    norms = head * (4 * double + 2 * single)
    return Transformer(hidden, heads, 4 * hidden, tuple(linears), attentions, norms, double + single)


def flux2(config: Config) -> Transformer:
    """FLUX.2: no biases, SwiGLU, and one modulation for all blocks of a kind."""
    heads, head = config.get("num_attention_heads", 48), config.get("attention_head_dim", 128)
    hidden, channels = heads * head, config.get("in_channels", 128)
    ffn = int(hidden * config.get("mlp_ratio", 3.0))
    out = (config.get("out_channels") or channels) * config.get("patch_size", 1) ** 2
    double, single = config.get("num_layers", 8), config.get("num_single_layers", 48)
    guidance = config.get("guidance_embeds", True)
    linears = [
        *_vector(config.get("timestep_guidance_channels", 256), hidden, 2 if guidance else 1, False),
        Linear(hidden, 6 * hidden, 2, False),
        Linear(hidden, 3 * hidden, 1, False),
        Linear(channels, hidden, 1, False, "image"),
        Linear(config.get("joint_attention_dim", 15360), hidden, 1, False, "text"),
        *(layer for tokens in STREAMS for layer in _attention(hidden, double, tokens, False)),
        *(layer for tokens in STREAMS for layer in _swiglu(hidden, ffn, double, tokens)),
        Linear(hidden, 3 * hidden + 2 * ffn, single, False, "all", "columns"),
        Linear(hidden + ffn, hidden, single, False, "all", "rows"),
        Linear(hidden, 2 * hidden, 1, False),
        Linear(hidden, out, 1, False, "image"),
    ]
    attentions = (Attention(hidden, "all", "all", double + single),)
    norms = head * (4 * double + 2 * single)
    return Transformer(hidden, heads, 2 * ffn, tuple(linears), attentions, norms, double + single)


def qwen_image(config: Config) -> Transformer:
    """Qwen-Image: blocks of two streams."""
    heads, head = config.get("num_attention_heads", 24), config.get("attention_head_dim", 128)
    hidden, layers, text = heads * head, config.get("num_layers", 60), config.get("joint_attention_dim", 3584)
    patch, channels = config.get("patch_size", 2), config.get("in_channels", 64)
    linears = [
        *_vector(256, hidden),
        Linear(channels, hidden, tokens="image"),
        Linear(text, hidden, tokens="text"),
        Linear(hidden, 6 * hidden, 2 * layers, split="columns"),
        *(layer for tokens in STREAMS for layer in _attention(hidden, layers, tokens)),
        *(layer for tokens in STREAMS for layer in _mlp(hidden, 4 * hidden, layers, tokens)),
        Linear(hidden, 2 * hidden),
        Linear(hidden, patch**2 * (config.get("out_channels", 16) or channels), tokens="image"),
    ]
    attentions = (Attention(hidden, "all", "all", layers),)
    return Transformer(hidden, heads, 4 * hidden, tuple(linears), attentions, text + 4 * head * layers, layers)


def hunyuan_image(config: Config) -> Transformer:
    """HunyuanImage-2.1: refines two texts, then blocks of two streams, then blocks of one."""
    heads, head = config.get("num_attention_heads", 28), config.get("attention_head_dim", 128)
    hidden, channels = heads * head, config.get("in_channels", 64)
    ffn, pixels = int(hidden * config.get("mlp_ratio", 4.0)), math.prod(config.get("patch_size", (1, 1)))
    double, single = config.get("num_layers", 20), config.get("num_single_layers", 40)
    refiner, text = config.get("num_refiner_layers", 2), config.get("text_embed_dim", 3584)
    glyphs = config.get("text_embed_2_dim")
    linears = [
        *_vector(256, hidden, 2 + bool(config.get("use_meanflow")) + bool(config.get("guidance_embeds"))),
        *_vector(text, hidden),
        Linear(text, hidden, tokens="text"),
        *_attention(hidden, refiner, "text"),
        *_mlp(hidden, ffn, refiner, "text"),
        Linear(hidden, 2 * hidden, refiner),
        *([Linear(glyphs, 2048), Linear(2048, 2048), Linear(2048, hidden)] if glyphs else ()),
        Linear(channels * pixels, hidden, tokens="image"),
        Linear(hidden, 6 * hidden, 2 * double),
        *(layer for tokens in STREAMS for layer in _attention(hidden, double, tokens)),
        *(layer for tokens in STREAMS for layer in _mlp(hidden, ffn, double, tokens)),
        Linear(hidden, 3 * hidden, single),
        Linear(hidden, 3 * hidden, single, True, "all"),
        Linear(hidden, ffn, single, True, "all"),
        Linear(hidden + ffn, hidden, single, True, "all"),
        Linear(hidden, 2 * hidden),
        Linear(hidden, (config.get("out_channels") or channels) * pixels, tokens="image"),
    ]
    attentions = (Attention(hidden, "all", "all", double + single),)
    norms = head * (4 * double + 2 * single) + 4 * hidden * refiner + 2 * (glyphs or 0)
    return Transformer(hidden, heads, ffn, tuple(linears), attentions, norms, double + single)


def z_image(config: Config) -> Transformer:
    """Z-Image: refiners of each stream, then blocks of one stream; SwiGLU of 8/3 of the width."""
    hidden, heads = config.get("dim", 3840), config.get("n_heads", 30)
    layers, refiners = config.get("n_layers", 30), config.get("n_refiner_layers", 2)
    ffn, modulation, text = int(hidden / 3 * 8), min(hidden, 256), config.get("cap_feat_dim", 2560)
    patches = zip(config.get("all_patch_size", [2]), config.get("all_f_patch_size", [1]), strict=True)
    patch = sum(side**2 * frames for side, frames in patches) * config.get("in_channels", 16)
    linears = [
        Linear(256, 1024),
        Linear(1024, modulation),
        Linear(text, hidden, tokens="text"),
        Linear(patch, hidden, tokens="image"),
        Linear(modulation, hidden),
        Linear(hidden, patch, tokens="image"),
        Linear(modulation, 4 * hidden, layers + refiners),
    ]
    attentions = []
    stacks: list[tuple[int, Tokens]] = [(layers, "all"), (refiners, "image"), (refiners, "text")]
    for times, tokens in stacks:
        linears += [*_attention(hidden, times, tokens, False), *_swiglu(hidden, ffn, times, tokens)]
        attentions.append(Attention(hidden, tokens, tokens, times))
    blocks = layers + 2 * refiners
    norms = blocks * (2 * (hidden // heads) + 4 * hidden) + text + 2 * hidden
    return Transformer(hidden, heads, 2 * ffn, tuple(linears), tuple(attentions), norms, blocks)


def sd3(config: Config) -> Transformer:
    """SD3.5: blocks of two streams, of which the last leaves the prompt as it is; some attend to the image twice."""
    heads, head = config.get("num_attention_heads", 18), config.get("attention_head_dim", 64)
    hidden, layers = heads * head, config.get("num_layers", 18)
    dual, text = len(config.get("dual_attention_layers", ())), config.get("caption_projection_dim", 1152)
    patch = config.get("patch_size", 2) ** 2
    linears = [
        Linear(config.get("in_channels", 16) * patch, hidden, tokens="image"),
        *_vector(256, hidden),
        *_vector(config.get("pooled_projection_dim", 2048), hidden),
        Linear(config.get("joint_attention_dim", 4096), text, tokens="text"),
        Linear(hidden, 6 * hidden, layers - dual, split="columns"),
        Linear(hidden, 9 * hidden, dual, split="columns"),
        Linear(hidden, 6 * hidden, layers - 1, split="columns"),
        Linear(hidden, 2 * hidden, split="columns"),
        *_attention(hidden, layers, "image"),
        *_attention(hidden, dual, "image"),
        Linear(hidden, hidden, 3 * layers, True, "text", "columns"),
        Linear(hidden, hidden, layers - 1, True, "text", "rows"),
        *_mlp(hidden, 4 * hidden, layers, "image"),
        *_mlp(hidden, 4 * hidden, layers - 1, "text"),
        Linear(hidden, 2 * hidden),
        Linear(hidden, patch * config.get("out_channels", 16), tokens="image"),
    ]
    attentions = (Attention(hidden, "all", "all", layers), Attention(hidden, "image", "image", dual))
    norms = head * (4 * layers + 2 * dual) if config.get("qk_norm") else 0
    return Transformer(hidden, heads, 4 * hidden, tuple(linears), attentions, norms, layers)


def wan(config: Config) -> Transformer:
    """Wan 2.x: attention among the video's tokens, then to the prompt; norms over all heads."""
    heads, head = config.get("num_attention_heads", 40), config.get("attention_head_dim", 128)
    hidden, layers = heads * head, config.get("num_layers", 40)
    frames, high, wide = config.get("patch_size", (1, 2, 2))
    patch, ffn = frames * high * wide, config.get("ffn_dim", 13824)
    linears = [
        Linear(config.get("in_channels", 16) * patch, hidden, tokens="image"),
        *_vector(config.get("freq_dim", 256), hidden),
        Linear(hidden, 6 * hidden),
        *_vector(config.get("text_dim", 4096), hidden),
        *_attention(hidden, layers, "image"),
        Linear(hidden, hidden, layers, True, "image", "columns"),
        Linear(hidden, hidden, 2 * layers, True, "text", "columns"),
        Linear(hidden, hidden, layers, True, "image", "rows"),
        *_mlp(hidden, ffn, layers, "image"),
        Linear(hidden, patch * (config.get("out_channels") or 16), tokens="image"),
    ]
    attentions = (Attention(hidden, "image", "image", layers), Attention(hidden, "image", "text", layers))
    norms = layers * (6 + 4 + 2 * bool(config.get("cross_attn_norm", True))) * hidden + 2 * hidden
    return Transformer(hidden, heads, ffn, tuple(linears), attentions, norms, layers)


def helios(config: Config) -> Transformer:
    """Helios: Wan's layers, and what reads the frames before, in three grains."""
    model = wan(config)
    patch = config.get("in_channels", 16) * math.prod(config.get("patch_size", (1, 2, 2)))
    history = (1, 2**3, 4**3) if config.get("has_multi_term_memory_patch", True) else ()
    scales = 1 if config.get("history_scale_mode") == "scalar" else model.num_heads
    return dataclasses.replace(
        model,
        linears=model.linears + tuple(Linear(grain * patch, model.hidden) for grain in history),
        num_vector_params=model.num_vector_params + scales * model.num_blocks * bool(config.get("is_amplify_history")),
    )


STREAMS: tuple[Tokens, ...] = ("image", "text")

FAMILIES: dict[str, Callable[[Config], Transformer]] = {
    "FluxTransformer2DModel": flux,
    "Flux2Transformer2DModel": flux2,
    "QwenImageTransformer2DModel": qwen_image,
    "HunyuanImageTransformer2DModel": hunyuan_image,
    "ZImageTransformer2DModel": z_image,
    "SD3Transformer2DModel": sd3,
    "WanTransformer3DModel": wan,
    "HeliosTransformer3DModel": helios,
}
