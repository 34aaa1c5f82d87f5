"""One word, one token: the tokenizer of the demo pipelines, and the table that training reads in its place."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast as UntypedTokenizer

PreTrainedTokenizerFast: Any = UntypedTokenizer  # its class carries no types


def build_tokenizer(words: list[str], length: int) -> Any:
    """Lower case, punctuation dropped, ``</s>`` at the end, padded to ``length`` with ``<pad>``.

    Args:
        words: the vocabulary; the first three are ``<pad>``, ``</s>`` and ``<unk>``.
        length: tokens.
    """
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(r"[^a-z0-9\s]"), " ")])
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=length,
        padding_side="right",
        truncation_side="right",
    )


def token_table(captions: list[str], words: list[str], length: int) -> torch.Tensor:
    """[n, length] int64 token ids of captions of the grammar, as the tokenizer gives them."""
    index = {word: i for i, word in enumerate(words)}
    rows = []
    for text in captions:
        row = [index[word] for word in text.split()] + [1]
        rows.append(row + [0] * (length - len(row)))
    return torch.tensor(rows)
