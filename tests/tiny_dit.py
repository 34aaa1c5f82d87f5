"""Tiny checkpoints of the diffusion families, built offline from their configs with random weights.

``build(family, folder)`` writes a folder that plain ``DiffusionPipeline.from_pretrained`` loads.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanImage,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    HeliosPipeline,
    HeliosTransformer3DModel,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.guiders import AdaptiveProjectedMixGuidance
from diffusers.schedulers.scheduling_helios import HeliosScheduler

from tests.tiny_text import clip, qwen3, qwen_vl, t5, tokenizer, umt5


def _image_vae(channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=channels,
        shift_factor=0.1,
        scaling_factor=0.5,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def flux() -> DiffusionPipeline:
    tok = tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=_image_vae(4),
        text_encoder=clip(len(tok)),
        tokenizer=tok,
        text_encoder_2=t5(len(tok)),
        tokenizer_2=tok,
        transformer=transformer,
    )


def flux2() -> DiffusionPipeline:
    tok = tokenizer()
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
    )
    transformer = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=96,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=qwen3(len(tok), causal=True, layers=28),
        tokenizer=tok,
        transformer=transformer,
        is_distilled=False,
    )


def qwen_image() -> DiffusionPipeline:
    tok = tokenizer()
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=qwen_vl(len(tok)),
        tokenizer=tok,
        transformer=transformer,
    )


def hunyuan_image() -> DiffusionPipeline:
    tok = tokenizer()
    transformer = HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=32,
        text_embed_2_dim=32,
        rope_axes_dim=(8, 8),
    )
    vae = AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32, 32, 64),
        layers_per_block=1,
        spatial_compression_ratio=8,
        sample_size=64,
        scaling_factor=0.5,
    )
    return HunyuanImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=qwen_vl(len(tok)),
        tokenizer=tok,
        text_encoder_2=t5(len(tok)),
        tokenizer_2=tok,
        transformer=transformer,
        guider=AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=1),
    )


def z_image() -> DiffusionPipeline:
    tok = tokenizer()
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=64,
        n_layers=2,
        n_refiner_layers=2,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=32,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "pad_token" in name:
                parameter.zero_()
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_image_vae(4),
        text_encoder=qwen3(len(tok), causal=False),
        tokenizer=tok,
        transformer=transformer,
    )


def sd3() -> DiffusionPipeline:
    tok = tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=64,
        pooled_projection_dim=64,
        out_channels=4,
        pos_embed_max_size=64,
    )
    return StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_image_vae(4),
        text_encoder=clip(len(tok), projected=True),
        tokenizer=tok,
        text_encoder_2=clip(len(tok), projected=True),
        tokenizer_2=tok,
        text_encoder_3=t5(len(tok), width=64),
        tokenizer_3=tok,
        transformer=transformer,
    )


def _wan_transformer(in_channels: int) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=12,
        in_channels=in_channels,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )


def _wan(cls: Any, in_channels: int, **extra: Any) -> DiffusionPipeline:
    tok = tokenizer()
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    return cls(
        tokenizer=tok,
        text_encoder=umt5(len(tok)),
        vae=vae,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        transformer=_wan_transformer(in_channels),
        transformer_2=_wan_transformer(in_channels),
        boundary_ratio=0.875,
        **extra,
    )


def wan() -> DiffusionPipeline:
    return _wan(WanPipeline, 16)


def wan_i2v() -> DiffusionPipeline:
    return _wan(WanImageToVideoPipeline, 36, image_encoder=None, image_processor=None)


def helios() -> DiffusionPipeline:
    tok = tokenizer()
    transformer = HeliosTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_dim=(4, 4, 4),
        is_amplify_history=True,
    )
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    return HeliosPipeline(
        tokenizer=tok,
        text_encoder=umt5(len(tok)),
        vae=vae,
        scheduler=HeliosScheduler(stages=1),
        transformer=transformer,
    )


FAMILIES: dict[str, Callable[[], DiffusionPipeline]] = {
    "flux": flux,
    "flux2": flux2,
    "qwen_image": qwen_image,
    "hunyuan_image": hunyuan_image,
    "z_image": z_image,
    "sd3": sd3,
    "wan": wan,
    "wan_i2v": wan_i2v,
    "helios": helios,
}


def build(family: str, folder: Path) -> Path:
    """Write the family's tiny checkpoint; the same weights every time."""
    torch.manual_seed(0)
    pipe = FAMILIES[family]()
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    pipe.save_pretrained(folder)
    return folder
