"""Seconds of one image or video, and tokens per second, from a model's FLOP and the hardware table.

One forward takes: its matrix products at the card's rate, its attention at the attention kernel's, the passes of
everything else over the activations at the memory's, and what the ranks exchange at the link's. The constants are
fitted to FLUX.1-dev, Qwen-Image and Z-Image on an H200; tests hold them to measured and published figures within 15%.
"""

from __future__ import annotations

from dataclasses import dataclass

from omni_ray.config.spec import ArGroup, DitGroup, DitParallel
from omni_ray.plan.autoencoders import Autoencoder
from omni_ray.plan.cards import FAST_ATTENTION_GAIN, Card
from omni_ray.plan.checkpoint import Component
from omni_ray.plan.language import Language
from omni_ray.plan.linear import Transformer, token_counts
from omni_ray.plan.memory import bytes_per_weight, decode_ranks
from omni_ray.plan.parts import Part
from omni_ray.plan.request import Request

FAST_ATTENTION = ("_native_cudnn", "_flash_3", "flash_4")

EAGER_PASSES = 175.0
EAGER_PASSES_OF = {"ZImageTransformer2DModel": 300.0}
"""Reads or writes of [tokens, hidden] per block besides matrix products. Z-Image rotates in complex numbers."""
COMPILED_PASSES = 57.0

DECODE_EFFICIENCY = 0.35
"""Of an autoencoder's convolutions, against matrix products."""

LINK_EFFICIENCY = 0.7
SEQUENCE_COLLECTIVE_S = 100e-6
SUM_S = 30e-6
"""Time of an exchange of nothing: its kernels, and for sequence parallelism the copies around it."""


@dataclass(frozen=True)
class Estimate:
    """Seconds of one request alone. ``forwards`` run after one another; each costs ``tflop`` over all its ranks."""

    seconds: float
    forwards: int
    tflop: float


def dit_seconds(group: DitGroup, parts: tuple[Part, ...], request: Request, card: Card) -> Estimate | None:
    """None where the model's class, or the card's rates, are not known."""
    known = [part for part in parts if part.role == "transformer" and isinstance(part.model, Transformer)]
    if not known or not card.tflops:
        return None
    part, model = known[0], known[0].model
    assert isinstance(model, Transformer)
    forwards = request.steps * max(1, request.branches // group.parallel.cfg)
    one = _forward_s(group, model, part.component.cls, request, card)
    rest = sum(_once_s(group, each, request, card) for each in parts)
    image, text = request.image_tokens, request.text_tokens
    tflop = (model.linear_flop(image, text) + model.attention_flop(image, text)) / 1e12
    return Estimate(forwards * one + rest, forwards, tflop)


def _forward_s(group: DitGroup, model: Transformer, cls: str, request: Request, card: Card) -> float:
    image, text = request.image_tokens, request.text_tokens
    axes, tokens = group.parallel, image + text
    ranks = axes.tensor * axes.ulysses * axes.ring
    fast = (group.attention.backend or "").startswith(FAST_ATTENTION)
    attention_tflops = card.attention_tflops * (FAST_ATTENTION_GAIN.get(card.name, 1.0) if fast else 1.0)
    compiled = group.compile.mode != "none"
    passes = COMPILED_PASSES if compiled else EAGER_PASSES_OF.get(cls, EAGER_PASSES)
    moved = passes * tokens * model.hidden * 2 * model.num_blocks / (axes.ulysses * axes.ring)
    return (
        model.linear_flop(image, text) / ranks / card.tflops / 1e12
        + model.attention_flop(image, text) / ranks / attention_tflops / 1e12
        + moved / card.memory_gbs / 1e9
        + _exchange_s(axes, model, image, text, card)
    )


def _exchange_s(axes: DitParallel, model: Transformer, image: int, text: int, card: Card) -> float:
    link = (card.nvlink_gbs or card.pcie_gbs) * LINK_EFFICIENCY * 1e9
    sequence = model.num_blocks * (2 * (axes.ulysses > 1) + (axes.ring > 1))
    # Layers of one vector that are split by columns are modulations, which the ranks put together again.
    joined = [each for each in model.linears if each.split == "rows" or (each.split == "columns" and each.is_once)]
    sums = sum(each.times for each in joined) * (axes.tensor > 1)
    return sent_bytes(axes, model, image, text) / link + sequence * SEQUENCE_COLLECTIVE_S + sums * SUM_S


def sent_bytes(axes: DitParallel, model: Transformer, image: int, text: int) -> float:
    """Bytes that one rank sends in a forward in 16 bits.

    Per attention, Ulysses exchanges query, key, value and output, and ring passes keys and values on, each of the shard
    that a rank has; tensor parallelism sums the output of every layer that is split by rows.
    """
    count = token_counts(image, text)
    sequence = axes.ulysses * axes.ring
    shard = sum(2.0 * each.times * count[each.queries] * each.width for each in model.attentions if each.is_split)
    shard /= sequence * axes.tensor
    summed = sum(2.0 * each.times * count[each.tokens] * each.outputs for each in model.linears if each.split == "rows")
    return (
        4 * shard * (axes.ulysses - 1) / axes.ulysses
        + 2 * shard * (axes.ring - 1)
        + 2 * summed / sequence * (axes.tensor - 1) / axes.tensor
    )


def _once_s(group: DitGroup, part: Part, request: Request, card: Card) -> float:
    """Seconds of a text encoder or of the decode, which run once a request."""
    if isinstance(part.model, Language):
        flop = 2.0 * part.model.num_active_weights * request.text_tokens * request.branches
        return max(flop / card.tflops / 1e12, part.model.num_active_weights * 2 / card.memory_gbs / 1e9)
    if isinstance(part.model, Autoencoder):
        rate = DECODE_EFFICIENCY * card.tflops * 1e12
        pixels = request.width * request.height * request.frames
        return part.model.decode_flop_per_pixel * pixels / (rate * decode_ranks(group, part.model))
    return 0.0


def ar_tokens_per_s(group: ArGroup, model: Language, component: Component, card: Card) -> float | None:
    """The most that one request can get: each token reads the weights that it is multiplied with once."""
    if not card.memory_gbs:
        return None
    num_bytes = model.num_active_weights * bytes_per_weight(group, model, component)
    return card.memory_gbs * 1e9 * group.parallel.tensor / num_bytes
