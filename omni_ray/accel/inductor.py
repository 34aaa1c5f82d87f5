"""What PyTorch's compiler is told about the kernels of diffusion transformers.

What each rule came to is in benchmarks/forward.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._inductor import decomposition
from torch._inductor.choices import InductorChoices

LONGEST_ROW = 16384
"""Values that one block of threads holds in registers."""

ENOUGH_ROWS = 512
"""So many keep every multiprocessor of a card busy."""

RULES = "rules-1"
"""The folder of what the compiler makes by these rules: raise it with any change here, for the compiler's own keys do
not know of them."""


def teach() -> None:
    """From now on the compiler of this process follows these rules, in every thread."""
    decomposition.decompositions[torch.ops.aten.gelu.default] = _gelu
    decomposition.fast_random_decomps.cache_clear()
    InductorChoices.should_use_persistent_reduction = staticmethod(_reads_rows_once)  # type: ignore
    InductorChoices.reduction_split_factor = staticmethod(_parts_of_a_row)  # type: ignore


_is_short = InductorChoices.should_use_persistent_reduction
_parts = InductorChoices.reduction_split_factor
_gelu_of_torch = decomposition.decompositions[torch.ops.aten.gelu.default]


def _reads_rows_once(features: Any, cooperative_reduction: bool) -> bool:
    """A norm and a conversion to 8 bits need a row twice; of one that stays in registers it is read once."""
    length = features.reduction_numel
    if length.is_Integer and length <= LONGEST_ROW and not cooperative_reduction:
        return True
    return bool(_is_short(features, cooperative_reduction))


def _parts_of_a_row(device: torch.device, length: int, num_rows: int, inner_reduction: bool) -> int:
    """One, where rows are many: parts need a second kernel, and what follows cannot be joined to the first."""
    return 1 if num_rows >= ENOUGH_ROWS else int(_parts(device, length, num_rows, inner_reduction=inner_reduction))


def _gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """The same by a sigmoid, for which a GPU has instructions; it has none for a precise tanh."""
    if approximate != "tanh":
        return _gelu_of_torch(x, approximate=approximate)  # type: ignore[no-any-return]
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.sigmoid(1.5957691216057308 * (wide + 0.044715 * wide**3))).to(x.dtype)
