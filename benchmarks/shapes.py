"""Checkpoint folders with the configs of well-known models and no weights, for `load_format: dummy`.

    python -m benchmarks.shapes flux|qwen_image|qwen3_8b|z_image|wan FOLDER

Shapes are those of black-forest-labs/FLUX.1-dev, Qwen/Qwen-Image, Qwen/Qwen3-8B, Tongyi-MAI/Z-Image-Turbo and
Wan-AI/Wan2.2-T2V-A14B. The tokenizer is a byte-level one
of our own: its tokens mean nothing to random weights.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    UniPCMultistepScheduler,
)
from transformers import CLIPTextConfig, PretrainedConfig, Qwen2_5_VLConfig, Qwen3Config, T5Config

from omni_ray.plan.checkpoint import SHAPES as SHIPPED
from tests.tiny_text import tokenizer


def flux(folder: Path) -> None:
    """FLUX.1-dev: 11.9B transformer, T5-XXL and CLIP-L encoders."""
    configs: dict[str, Any] = {
        "transformer": (FluxTransformer2DModel, {"guidance_embeds": True}),
        "vae": (
            AutoencoderKL,
            {
                "block_out_channels": [128, 256, 512, 512],
                "down_block_types": ["DownEncoderBlock2D"] * 4,
                "up_block_types": ["UpDecoderBlock2D"] * 4,
                "layers_per_block": 2,
                "latent_channels": 16,
                "scaling_factor": 0.3611,
                "shift_factor": 0.1159,
                "use_quant_conv": False,
                "use_post_quant_conv": False,
            },
        ),
        "text_encoder": CLIPTextConfig(
            vocab_size=49408,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            projection_dim=768,
            eos_token_id=2,
        ),
        "text_encoder_2": T5Config(
            vocab_size=32128,
            d_model=4096,
            d_kv=64,
            d_ff=10240,
            num_layers=24,
            num_heads=64,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        ),
    }
    classes = {
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
    }
    _write(folder, "FluxPipeline", configs, classes, tokenizers=("tokenizer", "tokenizer_2"))


def qwen_image(folder: Path) -> None:
    """Qwen-Image: 20.4B transformer, Qwen2.5-VL-7B encoder."""
    text = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "default", "mrope_section": [16, 24, 24], "rope_type": "default"},
    }
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    configs = {
        "transformer": (QwenImageTransformer2DModel, {}),
        "vae": (AutoencoderKLQwenImage, {}),
        "text_encoder": Qwen2_5_VLConfig(text_config=text, vision_config=vision),
    }
    classes = {
        "transformer": ["diffusers", "QwenImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    }
    _write(folder, "QwenImagePipeline", configs, classes, tokenizers=("tokenizer",))


def qwen3_8b(folder: Path) -> None:
    """Qwen3-8B."""
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rope_theta=1e6,
        tie_word_embeddings=False,
        architectures=["Qwen3ForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def shipped(name: str, scheduler: Any) -> Callable[[Path], None]:
    """A pipeline whose configs the plan ships, with our tokenizer and this scheduler."""

    def write(folder: Path) -> None:
        shutil.copytree(SHIPPED / name, folder, dirs_exist_ok=True)
        index = json.loads((folder / "model_index.json").read_text())
        index |= {
            "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
            "scheduler": ["diffusers", type(scheduler).__name__],
        }
        (folder / "model_index.json").write_text(json.dumps(index, indent=1))
        tokenizer().save_pretrained(folder / "tokenizer")
        scheduler.save_pretrained(folder / "scheduler")

    return write


def _write(
    folder: Path, pipeline: str, configs: dict[str, Any], classes: dict[str, list[str]], tokenizers: tuple[str, ...]
) -> None:
    index: dict[str, Any] = {
        "_class_name": pipeline,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        **classes,
    }
    for name, config in configs.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        if isinstance(config, PretrainedConfig):
            config.save_pretrained(folder / name)
        else:
            cls, values = config
            (folder / name / "config.json").write_text(json.dumps({"_class_name": cls.__name__, **values}))
    for name in tokenizers:
        index[name] = ["transformers", "PreTrainedTokenizerFast"]
        tokenizer().save_pretrained(folder / name)
    FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, shift=3.0, base_shift=0.5, max_shift=1.15
    ).save_pretrained(folder / "scheduler")
    if pipeline == "FluxPipeline":
        index |= {"image_encoder": [None, None], "feature_extractor": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))


SHAPES = {
    "flux": flux,
    "qwen_image": qwen_image,
    "qwen3_8b": qwen3_8b,
    "z_image": shipped("Tongyi-MAI--Z-Image-Turbo", FlowMatchEulerDiscreteScheduler(shift=3.0)),
    "wan": shipped(
        "Wan-AI--Wan2.2-T2V-A14B-Diffusers",
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ),
}

if __name__ == "__main__":
    SHAPES[sys.argv[1]](Path(sys.argv[2]))
