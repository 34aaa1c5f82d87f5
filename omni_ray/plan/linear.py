"""A model as a list of linear layers, from which parameters, multiplications and tensor-parallel shares follow."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Tokens = Literal["image", "text", "all", "once"]
"""Which tokens go through a layer: those of the image, of the prompt, both, or one vector per forward."""

Split = Literal["none", "columns", "rows"]
"""What tensor parallelism does to a layer: it is copied, or each rank holds a part of its outputs, or of its inputs."""


@dataclass(frozen=True)
class Linear:
    """``times`` linear layers of ``inputs`` x ``outputs``."""

    inputs: int
    outputs: int
    times: int = 1
    bias: bool = True
    tokens: Tokens = "once"
    split: Split = "none"

    @property
    def is_once(self) -> bool:
        """Whether only one vector per forward goes through it."""
        return self.tokens == "once"

    @property
    def num_weights(self) -> int:
        return self.times * self.inputs * self.outputs

    @property
    def num_params(self) -> int:
        return self.num_weights + self.times * self.outputs * self.bias

    def params_per_rank(self, tensor: int) -> float:
        """Parameters on each of ``tensor`` ranks. The bias of a layer that is split by rows is copied."""
        if self.split == "none":
            return self.num_params
        if self.split == "rows":
            return self.num_weights / tensor + self.num_params - self.num_weights
        return self.num_params / tensor


@dataclass(frozen=True)
class Attention:
    """``times`` attentions of ``queries`` tokens to ``keys`` tokens, ``width`` = heads x head size."""

    width: int
    queries: Tokens
    keys: Tokens
    times: int = 1

    @property
    def is_split(self) -> bool:
        """Whether sequence parallelism exchanges its heads or keys; each rank attends to the whole prompt by itself."""
        return self.keys != "text"


@dataclass(frozen=True)
class Transformer:
    """A transformer's layers. ``num_vector_params`` are those of norms, tables and the like, which every rank holds."""

    hidden: int
    num_heads: int
    ffn: int
    linears: tuple[Linear, ...]
    attentions: tuple[Attention, ...]
    num_vector_params: int
    num_blocks: int

    @property
    def num_params(self) -> int:
        return sum(each.num_params for each in self.linears) + self.num_vector_params

    def params_per_rank(self, tensor: int) -> float:
        return sum(each.params_per_rank(tensor) for each in self.linears) + self.num_vector_params

    def linear_flop(self, image: int, text: int) -> float:
        """Of one forward over ``image`` + ``text`` tokens; a multiply-add is 2 FLOP."""
        count = token_counts(image, text)
        return sum(2.0 * each.num_weights * count[each.tokens] for each in self.linears)

    def attention_flop(self, image: int, text: int) -> float:
        """Of one forward: queries x keys x width, for the scores and for the values."""
        count = token_counts(image, text)
        return sum(4.0 * a.times * count[a.queries] * count[a.keys] * a.width for a in self.attentions)


def token_counts(image: int, text: int) -> dict[Tokens, int]:
    return {"image": image, "text": text, "all": image + text, "once": 1}


def total(linears: Iterable[Linear]) -> int:
    return sum(each.num_params for each in linears)
