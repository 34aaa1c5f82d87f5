"""Seconds of one image or video, and tokens per second, from a model's FLOP and the hardware table.

One forward takes: its matrix products at the card's rate, its attention at the attention kernel's, the passes of
everything else over the activations at the memory's, and what the ranks exchange at the link's. The constants are
fitted to FLUX.1-dev, Qwen-Image and Z-Image on an H200; tests hold them to measured and published figures within 15%.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from omni_ray.config.spec import ArGroup, DitGroup, DitParallel, Parallel
from omni_ray.plan.autoencoders import Autoencoder
from omni_ray.plan.cards import FAST_ATTENTION_GAIN, Card
from omni_ray.plan.checkpoint import Component
from omni_ray.plan.language import Language
from omni_ray.plan.levers import weights_of
from omni_ray.plan.linear import Transformer, token_counts
from omni_ray.plan.memory import bytes_per_weight, decode_ranks
from omni_ray.plan.parts import Part
from omni_ray.plan.request import Request

FAST_ATTENTION = ("cudnn", "fa3", "_native_cudnn", "_flash_3", "flash_4")

EAGER_PASSES = 175.0
EAGER_PASSES_OF = {"ZImageTransformer2DModel": 300.0}
"""Reads or writes of [tokens, hidden] per block besides matrix products. Z-Image rotates in complex numbers."""
COMPILED_PASSES = 57.0

FP8_GAIN = 1.75
"""Of matrix products whose two sides are in 8 bits, the conversion of the activations included."""

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
    network: tuple[tuple[str, float], ...] = ()
    """The axes whose ranks are on several nodes, and of ``seconds`` those that they spend between nodes."""


def dit_seconds(group: DitGroup, parts: tuple[Part, ...], request: Request, card: Card) -> Estimate | None:
    """None where the model's class, the card's rates, or the link to another node that it needs, are not known."""
    known = [part for part in parts if part.role == "transformer" and isinstance(part.model, Transformer)]
    if not known or not card.tflops:
        return None
    part, model = known[0], known[0].model
    assert isinstance(model, Transformer)
    forwards = request.steps * max(1, request.branches // group.parallel.cfg)
    crossing = nodes_of_axes(group.parallel)
    if crossing and not card.network_gbs:
        return None
    network = _network_s(group.parallel, model, request, card)
    weights = weights_of(group, parts, 2)
    streamed = max((each.offloaded for each in weights if not each.is_whole), default=0.0)
    brought = sum(each.offloaded for each in weights if each.is_whole)
    computed = _forward_s(group, model, part.component.cls, request, card) + sum(network.values())
    one = max(computed, streamed / card.pcie_gbs / 1e9)
    rest = sum(_once_s(group, each, request, card) for each in parts) + brought / card.pcie_gbs / 1e9
    image, text = request.image_tokens, request.text_tokens
    tflop = (model.linear_flop(image, text) + model.attention_flop(image, text)) / 1e12
    between = tuple((axis, forwards * network.get(axis, 0.0)) for axis in crossing)
    return Estimate(forwards * one + rest, forwards, tflop, between)


def _forward_s(group: DitGroup, model: Transformer, cls: str, request: Request, card: Card) -> float:
    image, text = request.image_tokens, request.text_tokens
    axes, tokens = group.parallel, image + text
    ranks = axes.tensor * axes.ulysses * axes.ring
    fast = group.attention.backend.startswith(FAST_ATTENTION) or (
        group.attention.backend == "auto" and card.name in FAST_ATTENTION_GAIN
    )
    attention_tflops = card.attention_tflops * (FAST_ATTENTION_GAIN.get(card.name, 1.0) if fast else 1.0)
    compiled = group.compile.mode != "none"
    passes = COMPILED_PASSES if compiled else EAGER_PASSES_OF.get(cls, EAGER_PASSES)
    moved = passes * tokens * model.hidden * 2 * model.num_blocks / (axes.ulysses * axes.ring)
    gain = FP8_GAIN if group.quantization.kind == "fp8" else 1.0
    return (
        model.linear_flop(image, text) / ranks / card.tflops / gain / 1e12
        + model.attention_flop(image, text) / ranks / attention_tflops / 1e12
        + moved / card.memory_gbs / 1e9
        + _exchange_s(axes, model, image, text, card)
    )


def _exchange_s(axes: DitParallel, model: Transformer, image: int, text: int, card: Card) -> float:
    link, crossing = (card.nvlink_gbs or card.pcie_gbs) * LINK_EFFICIENCY * 1e9, nodes_of_axes(axes)
    sent = sent_by_axis(axes, model, image, text)
    inside = sum(count * _share_inside(axis, axes, crossing) for axis, count in sent.items())
    sequence = model.num_blocks * (2 * (axes.ulysses > 1) + (axes.ring > 1))
    # Layers of one vector that are split by columns are modulations, which the ranks put together again.
    joined = [each for each in model.linears if each.split == "rows" or (each.split == "columns" and each.is_once)]
    sums = sum(each.times for each in joined) * (axes.tensor > 1)
    return inside / link + sequence * SEQUENCE_COLLECTIVE_S + sums * SUM_S


def nodes_of_axes(parallel: Parallel) -> dict[str, int]:
    """The axes that do not stay inside a node, and over how many nodes the ranks of one are spread.

    Ranks of the innermost axis are neighbours, and a node has ``ranks_per_node`` of them that follow each other.
    """
    inside, found = 1, {}
    for axis in parallel.axes:
        degree = getattr(parallel, axis)
        if degree > 1 and parallel.ranks_per_node % (inside * degree):
            found[axis] = min(degree, math.ceil(inside * degree / parallel.ranks_per_node))
        inside *= degree
    return found


def _network_s(axes: DitParallel, model: Transformer, request: Request, card: Card) -> dict[str, float]:
    """Seconds of a forward that each axis spends between nodes."""
    sent, found = sent_by_axis(axes, model, request.image_tokens, request.text_tokens), {}
    for axis, num_nodes in nodes_of_axes(axes).items():
        link = card.network_gbs * LINK_EFFICIENCY * 1e9
        if axis == "tensor":  # NCCL's sums use the links of all the cards of a node at once
            link = min(link * axes.tensor / num_nodes, (card.nvlink_gbs or card.pcie_gbs) * LINK_EFFICIENCY * 1e9)
        found[axis] = sent.get(axis, 0.0) * (1 - _share_inside(axis, axes, {axis: num_nodes})) / link
    return found


def _share_inside(axis: str, axes: DitParallel, crossing: dict[str, int]) -> float:
    """The part of what a rank sends over an axis that stays inside its node.

    Ulysses sends to every rank alike; the others pass everything on to the next, and the last one of a node is the
    slowest.
    """
    if axis not in crossing:
        return 1.0
    return (axes.ulysses / crossing[axis] - 1) / (axes.ulysses - 1) if axis == "ulysses" else 0.0


def sent_bytes(axes: DitParallel, model: Transformer, image: int, text: int) -> float:
    """Bytes that one rank sends in a forward in 16 bits."""
    return sum(sent_by_axis(axes, model, image, text).values())


def sent_by_axis(axes: DitParallel, model: Transformer, image: int, text: int) -> dict[str, float]:
    """Bytes that one rank sends over each axis in a forward in 16 bits.

    Per attention, Ulysses exchanges query, key, value and output, and ring passes keys and values on, each of the shard
    that a rank has; tensor parallelism sums the output of every layer that is split by rows.
    """
    count = token_counts(image, text)
    sequence = axes.ulysses * axes.ring
    shard = sum(2.0 * each.times * count[each.queries] * each.width for each in model.attentions if each.is_split)
    shard /= sequence * axes.tensor
    summed = sum(2.0 * each.times * count[each.tokens] * each.outputs for each in model.linears if each.split == "rows")
    return {
        "tensor": 2 * summed / sequence * (axes.tensor - 1) / axes.tensor,
        "ulysses": 4 * shard * (axes.ulysses - 1) / axes.ulysses,
        "ring": 2 * shard * (axes.ring - 1),
    }


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
