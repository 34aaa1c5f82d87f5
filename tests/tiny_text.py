"""Tiny tokenizers and text encoders of the diffusion families, with random weights."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over single bytes, with Qwen's special tokens and a chat template."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(
        ["a"], trainers.BpeTrainer(special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=77,
        chat_template=CHAT_TEMPLATE,
    )


def clip(vocab: int, projected: bool = False) -> Any:
    config = CLIPTextConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        projection_dim=32,
        eos_token_id=2,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def t5(vocab: int, width: int = 32) -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=vocab, d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4))


def umt5(vocab: int) -> UMT5EncoderModel:
    return UMT5EncoderModel(UMT5Config(vocab_size=vocab, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4))


def qwen3(vocab: int, causal: bool, layers: int = 3) -> Any:
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    return (Qwen3ForCausalLM if causal else Qwen3Model)(config)


def qwen_vl(vocab: int) -> Qwen2_5_VLForConditionalGeneration:
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocab,
            "hidden_size": 32,
            "intermediate_size": 37,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_scaling": {"type": "default", "mrope_section": [1, 1, 2], "rope_type": "default"},
            "rope_theta": 1e6,
        },
        vision_config={"depth": 1, "hidden_size": 32, "intermediate_size": 37, "num_heads": 4, "out_hidden_size": 32},
    )
    return Qwen2_5_VLForConditionalGeneration(config)
