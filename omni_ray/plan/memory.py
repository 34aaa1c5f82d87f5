"""GiB that one rank needs, by component, and why.

What tensor parallelism divides: the blocks of the transformers of a pipeline; everything of a language
model that vLLM serves. Ulysses, ring and CFG copy all weights to each rank and divide the activations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from omni_ray.config.catalog import can_be_recorded
from omni_ray.config.spec import ArGroup, DitGroup
from omni_ray.plan.autoencoders import Autoencoder
from omni_ray.plan.checkpoint import Component
from omni_ray.plan.language import Language
from omni_ray.plan.levers import Weights, weights_of
from omni_ray.plan.linear import Transformer
from omni_ray.plan.parts import Part
from omni_ray.plan.request import Request

GIB = 2**30
WIDTHS = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes of a number."""

CUDA_CONTEXT_GIB = 0.6
NCCL_GIB = 0.4
"""Buffers of a process group, on each rank of a gang of several."""

HOST_PROCESS_GIB = 1.0
"""Main memory of a process with torch and a model library, on a CPU."""

HIDDEN_TENSORS = 7.0
FFN_TENSORS = 2.2
"""Tensors of [tokens, hidden] and of [tokens, ffn] that one block of a transformer holds; a test counts them."""

DECODE_TENSORS = 3.0
DECODE_TENSORS_IN_TIME = 9.0
DECODE_TENSORS_OF_VIDEO = 27.0
"""Tensors of [pixels, peak channels] that an autoencoder holds at once while it decodes: one of images; one with
convolutions over time, for an image; the same for a video, whose latents it decodes one by one, to four frames each."""

TILED_CHANNELS = 5.0
"""Numbers kept of each pixel of a picture that is decoded in tiles: three colours, in tiles that overlap."""

QUANTIZED_BYTES = {"fp8": 1.0, "int8": 1.0, "bitsandbytes": 0.56, "awq": 0.56, "gptq": 0.56}
"""Bytes of a weight, scales included; embeddings and the head stay as they are."""


@dataclass(frozen=True)
class Item:
    """GiB of one component on one rank. ``tensor`` says whether tensor parallelism divides it."""

    name: str
    gib: float
    divided_by_tensor: bool = False


@dataclass(frozen=True)
class KvCache:
    """What is left for the KV cache of a rank, and what one request of the longest length needs of it."""

    num_tokens: int
    max_model_len: int
    gib_per_request: float


@dataclass(frozen=True)
class Memory:
    """What a rank needs. ``kv_cache`` is None for a DiT group, and on a card whose memory nobody told; ``host_gib`` are
    weights in main memory."""

    items: tuple[Item, ...]
    budget_gib: float
    kv_cache: KvCache | None = None
    host_gib: float = 0.0

    @property
    def needed_gib(self) -> float:
        return sum(item.gib for item in self.items)

    @property
    def fits(self) -> bool:
        return self.needed_gib <= self.budget_gib


def dit_memory(group: DitGroup, parts: tuple[Part, ...], request: Request, budget_gib: float, on_gpu: bool) -> Memory:
    """GiB per rank of a diffusers replica."""
    width = WIDTHS[group.dtype] if group.dtype != "auto" else 2 if on_gpu else 4
    weights = weights_of(group, parts, width)
    items = _weight_items(group, weights)
    items.append(Item("activations", _dit_activations(group, parts, request, width, on_gpu) / GIB))
    items.append(Item("workspace", _workspace(group.parallel.num_ranks, on_gpu)))
    return Memory(tuple(items), budget_gib, host_gib=sum(each.offloaded for each in weights) / GIB)


def _weight_items(group: DitGroup, weights: tuple[Weights, ...]) -> list[Item]:
    """Each component on the device, and of those that come as a whole the largest."""
    divided = group.parallel.tensor > 1
    items = [
        Item(each.part.name, each.resident / GIB, divided and each.part.role == "transformer")
        for each in weights
        if not each.is_whole
    ]
    if moving := [each for each in weights if each.is_whole]:
        largest = max(moving, key=lambda each: each.offloaded)
        names = ", ".join(each.part.name for each in moving)
        name = f"one of {names}" if len(moving) > 1 else names
        items.append(Item(name, largest.offloaded / GIB, divided and largest.part.role == "transformer"))
    return items


def _dit_activations(group: DitGroup, parts: tuple[Part, ...], request: Request, width: int, on_gpu: bool) -> float:
    """Bytes of the largest moment: a joined forward of a transformer, or the decode of one image. Recorded forwards
    keep theirs beside the decode."""
    vaes = [part.model for part in parts if isinstance(part.model, Autoencoder)]
    models = [part.model for part in parts if isinstance(part.model, Transformer)]
    forwards = [forward_bytes(group, model, request, width) for model in models]
    decodes = [decode_bytes(group, vae, request, width) for vae in vaes]
    transformers = [part.component.cls for part in parts if isinstance(part.model, Transformer)]
    if on_gpu and group.records_on_gpus and all(map(can_be_recorded, transformers)):
        return sum(forwards) + max([0.0, *decodes])
    return max([0.0, *forwards, *decodes])


def decode_ranks(group: DitGroup, vae: Autoencoder) -> int:
    """Ranks that share the rows of a decode."""
    return group.parallel.num_ranks if vae.has_rows and group.parallel.vae == "auto" else 1


def joined(group: DitGroup, request: Request) -> int:
    """Requests of the default size that one forward joins."""
    tokens = request.branches * (request.image_tokens + request.text_tokens)
    return max(1, min(group.batching.max_num_seqs, group.batching.max_num_batched_tokens // tokens))


def forward_bytes(group: DitGroup, model: Transformer, request: Request, width: int) -> float:
    axes = group.parallel
    branches = max(1, request.branches // axes.cfg)
    tokens = joined(group, request) * branches * (request.image_tokens + request.text_tokens)
    per_rank = tokens / (axes.ulysses * axes.ring)
    return per_rank * width * (HIDDEN_TENSORS * model.hidden + FFN_TENSORS * model.ffn / axes.tensor)


def decode_bytes(group: DitGroup, vae: Autoencoder, request: Request, width: int) -> float:
    """Of a rank, which decodes some rows of the picture, or of each tile, and keeps all tiles that were decoded."""
    tensors = DECODE_TENSORS
    if vae.temporal > 1:
        tensors = DECODE_TENSORS_OF_VIDEO if request.frames > 1 else DECODE_TENSORS_IN_TIME
    pixels, at_once, kept = request.width * request.height, 1 if group.vae.slicing else request.pictures, 0.0
    decoded = min(pixels, group.limits.max_pixels) if group.vae.slicing else pixels
    if group.vae.tiling and max(request.width, request.height) > vae.tile:
        tile = min(request.width, vae.tile) * min(request.height, vae.tile)
        decoded, kept = min(decoded, at_once * tile), pixels * request.frames * TILED_CHANNELS
    return (decoded * vae.peak_channels * tensors / decode_ranks(group, vae) + kept) * width


def _workspace(num_ranks: int, on_gpu: bool) -> float:
    return (CUDA_CONTEXT_GIB + (NCCL_GIB if num_ranks > 1 else 0)) if on_gpu else HOST_PROCESS_GIB


def ar_memory(group: ArGroup, model: Language, component: Component, budget_gib: float, on_gpu: bool) -> Memory:
    """GiB per rank of a vLLM replica. vLLM gives the KV cache all that its other parts leave of the budget."""
    axes = group.parallel
    width = WIDTHS.get(group.dtype, 2)
    weights = _ar_weights(group, model, component, width) / GIB
    offloaded = min(weights, group.offload.cpu_offload_gb)
    items = [
        Item("weights", weights - offloaded, axes.num_ranks > 1),
        Item("activations", _ar_activations(group, model, width) / GIB),
        Item("workspace", _workspace(axes.num_ranks, on_gpu)),
    ]
    per_token = _kv_bytes_per_token(group, model, width)
    max_len = max_model_len(group, model)
    one_request = max_len * per_token / GIB
    rest = budget_gib - sum(item.gib for item in items) if on_gpu else group.memory.cpu_kv_cache_gib
    kv_gib, cache = one_request, None
    if math.isfinite(rest):  # else nobody told the memory of the card
        kv_gib = max(rest, one_request)
        cache = KvCache(math.floor(max(rest, 0.0) * GIB / per_token), max_len, one_request)
    items.insert(1, Item("KV cache", kv_gib, axes.num_ranks > 1))
    return Memory(tuple(items), budget_gib, cache)


def max_model_len(group: ArGroup, model: Language) -> int:
    """Longest prompt and answer together, in tokens."""
    return int(engine_arg(group, "max_model_len", model.max_len))


def engine_arg(group: ArGroup, name: str, default: Any) -> Any:
    """A value of ``engine_args``, whose keys may have dashes."""
    return next((value for key, value in group.engine_args.items() if key.replace("-", "_") == name), default)


def _ar_weights(group: ArGroup, model: Language, component: Component, width: int) -> float:
    """Bytes of the fullest rank: of the pipeline's stages, the first has the embedding and the last the head."""
    axes = group.parallel
    layers = math.ceil(model.num_layers / axes.pipeline)
    per_layer = model.num_layer_params * bytes_per_weight(group, model, component)
    tables = (model.num_embed_params + model.num_head_params + model.num_other_params) * width
    at_one_end = tables if axes.pipeline == 1 else tables / 2
    # Of what the files hold beyond the language model, such as an image decoder, nobody knows how it is divided.
    beyond = 0 if component.num_packed_bytes else max(0, component.num_params - model.num_params) * width
    return (layers * per_layer + at_one_end) / axes.tensor + beyond


def bytes_per_weight(group: ArGroup, model: Language, component: Component) -> float:
    """Of a weight in the blocks. Of a checkpoint that is quantized itself, what is in its files is what is loaded."""
    width = WIDTHS.get(group.dtype, 2)
    if component.num_packed_bytes:
        stored = component.num_params * width + component.num_packed_bytes
        tables = (model.num_embed_params + model.num_head_params + model.num_other_params) * width
        return max(stored - tables, 0.0) / (model.num_layers * model.num_layer_params)
    own = component.config.get("quantization_config") or {}
    method = group.quantization or str(own.get("quant_method", ""))
    return QUANTIZED_BYTES.get(method.split("_")[0], width)


def _kv_bytes_per_token(group: ArGroup, model: Language, width: int) -> float:
    """Bytes per token and rank. Ranks share key-value heads where there are fewer heads than ranks."""
    axes = group.parallel
    heads = math.ceil(model.num_kv_heads / axes.tensor)
    layers = math.ceil(model.num_layers / axes.pipeline)
    value = 1 if str(engine_arg(group, "kv_cache_dtype", "auto")).startswith("fp8") else width
    return layers * 2 * heads * model.head_dim * value


def _ar_activations(group: ArGroup, model: Language, width: int) -> float:
    """Bytes of vLLM's profiling run: a full batch of prompt tokens, then the scores of every sequence."""
    tokens = int(engine_arg(group, "max_num_batched_tokens", 8192))
    sequences = int(engine_arg(group, "max_num_seqs", 256))
    vocabulary = model.num_embed_params // model.hidden
    blocks = tokens * width * (6 * model.hidden + 2 * model.ffn / group.parallel.tensor)
    return blocks + 2 * 4 * sequences * vocabulary
