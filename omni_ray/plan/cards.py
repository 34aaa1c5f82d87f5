"""The hardware table: what one card holds and how fast it is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A GPU. Rates are what programs reach, not what the data sheet says; one way, per card."""

    name: str
    gib: float
    """Memory that torch may use, in GiB."""
    tflops: float
    """Dense bfloat16 matrix products, in TFLOP/s."""
    attention_tflops: float
    """PyTorch's default attention in bfloat16, in TFLOP/s."""
    memory_gbs: float
    """Device memory, in GB/s."""
    pcie_gbs: float
    """Pinned host memory to device, in GB/s."""
    nvlink_gbs: float
    """To another card of the node, in GB/s; 0 is PCIe alone."""
    smi: str
    """What nvidia-smi's name of the card contains."""
    network_gbs: float = 0.0
    """To a card of another node, in GB/s; 0 is not known."""


# H100-80G and H200-141G are measured. Of the others the matrix rates are about 80% of the data sheet's dense figure, or
# less where the power limit is low, and the rest is the data sheet's. The network is an estimate: InfiniBand as such
# nodes are usually sold with, 400 Gb/s for each card, 200 beside an A100.
CARDS: dict[str, Card] = {
    card.name: card
    for card in (
        Card("H100-80G", 79.2, 750, 330, 3350, 55, 450, "H100 80GB", 50),
        Card("H200-141G", 139.8, 780, 330, 4800, 55, 450, "H200", 50),
        Card("H20-96G", 95.0, 135, 110, 4000, 55, 450, "H20", 50),
        Card("B200-180G", 178.0, 1700, 900, 8000, 55, 900, "B200", 50),
        Card("A100-80G", 79.1, 255, 190, 2039, 25, 300, "A100-SXM4-80GB", 25),
        Card("A100-40G", 39.4, 255, 190, 1555, 25, 300, "A100-SXM4-40GB", 25),
        Card("L40S-48G", 44.4, 250, 180, 864, 25, 0, "L40S"),
        Card("RTX6000Ada-48G", 47.4, 250, 180, 960, 25, 0, "RTX 6000 Ada"),
        Card("RTXPRO6000-96G", 94.9, 330, 230, 1597, 50, 0, "RTX PRO 6000"),
        Card("RTX5090-32G", 31.3, 190, 150, 1792, 50, 0, "RTX 5090"),
        Card("RTX4090-24G", 23.5, 150, 120, 1008, 25, 0, "RTX 4090"),
        Card("RTX3090-24G", 23.6, 60, 50, 936, 25, 0, "RTX 3090"),
        Card("A6000-48G", 47.4, 110, 85, 768, 25, 0, "RTX A6000"),
        Card("A10G-24G", 22.1, 55, 45, 600, 25, 0, "A10G"),
        Card("L4-24G", 22.0, 60, 50, 300, 25, 0, "NVIDIA L4"),
    )
}

FAST_ATTENTION_GAIN = {"H100-80G": 1.95, "H200-141G": 1.95}
"""How much faster cuDNN's attention and FlashAttention 3 are than PyTorch's default, measured on Hopper."""
