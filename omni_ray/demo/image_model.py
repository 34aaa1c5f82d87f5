"""The parts of ``demo:image``: a FLUX.1-architecture pipeline small enough to ship, built from random weights."""

from __future__ import annotations

from typing import Any

import diffusers as untyped_diffusers
import torch
from torch import nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from omni_ray.demo.scenes import COLOURS, SHAPES, SIZES
from omni_ray.demo.tokens import build_tokenizer

diffusers: Any = untyped_diffusers  # its classes carry no types

TEXT_TOKENS = 32  # both encoders' length; FluxPipeline masks no text, so training and use must agree on it
SHIFT = 3.0  # the scheduler's time shift, s in sigma = s u / (1 + (s - 1) u)
LATENT_CHANNELS = 4
DEFAULTS = {
    "num_inference_steps": 20,
    "height": 256,
    "width": 256,
    "max_sequence_length": TEXT_TOKENS,
    "guidance_scale": 1.0,
}
WORDS = [
    "<pad>",
    "</s>",
    "<unk>",
    "a",
    "an",
    "on",
    "background",
    "left",
    "right",
    "of",
    "above",
    "below",
    *SIZES,
    *COLOURS,
    *SHAPES,
]


class TextAndTransformer(nn.Module):
    """What flow matching trains jointly: both text encoders and the transformer.

    Call it with packed latents [batch, 256, 16], sigma [batch] in 0..1 and token ids [batch, 32]; it returns the
    predicted velocity noise - data [batch, 256, 16]. Both tokenizers give the same ids.
    """

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(WORDS),
                hidden_size=128,
                intermediate_size=384,
                num_hidden_layers=1,
                num_attention_heads=4,
                max_position_embeddings=TEXT_TOKENS,
                projection_dim=128,
                pad_token_id=0,
                bos_token_id=3,
                eos_token_id=1,
            )
        )
        self.text_encoder_2 = T5EncoderModel(
            T5Config(
                vocab_size=len(WORDS),
                d_model=192,
                d_kv=32,
                d_ff=384,
                num_layers=2,
                num_heads=6,
                dropout_rate=0.0,
                feed_forward_proj="gated-gelu",
                relative_attention_num_buckets=32,
                pad_token_id=0,
                eos_token_id=1,
                is_encoder_decoder=False,
                use_cache=False,
            )
        )
        self.transformer = diffusers.FluxTransformer2DModel(
            in_channels=4 * LATENT_CHANNELS,
            num_layers=2,
            num_single_layers=6,
            attention_head_dim=32,
            num_attention_heads=6,
            joint_attention_dim=192,
            pooled_projection_dim=128,
            guidance_embeds=False,
            axes_dims_rope=(8, 12, 12),
        )
        _start_as_identity(self.transformer)

    def forward(self, latents: torch.Tensor, sigma: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        pooled = self.text_encoder(ids).pooler_output
        text = self.text_encoder_2(ids)[0]
        velocity: torch.Tensor = self.transformer(
            hidden_states=latents,
            timestep=sigma,
            pooled_projections=pooled,
            encoder_hidden_states=text,
            txt_ids=torch.zeros(ids.shape[1], 3, device=ids.device),
            img_ids=image_ids(ids.device),
            return_dict=False,
        )[0]
        return velocity

    def loss(self, latents: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Mean squared velocity error at random times; latents [n, 4, 32, 32] of unit scale, ids [n, 32]."""
        data = pack(latents)
        uniform = torch.rand(len(data), device=data.device)
        sigma = SHIFT * uniform / (1 + (SHIFT - 1) * uniform)
        noise = torch.randn_like(data)
        level = sigma[:, None, None]
        with torch.autocast(data.device.type, torch.bfloat16):
            velocity = self((1 - level) * data + level * noise, sigma, ids)
        return functional.mse_loss(velocity.float(), noise - data)


def _start_as_identity(transformer: nn.Module) -> None:
    """Zeroes the gates and the output layer, so that every block starts as the identity (adaLN-zero, DiT)."""
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and (name.endswith(".linear") or name == "proj_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def image_ids(device: torch.device) -> torch.Tensor:
    """[256, 3]: zero, row and column of each latent token, as FluxPipeline numbers them."""
    ids = torch.zeros(16, 16, 3, device=device)
    ids[..., 1] += torch.arange(16, device=device)[:, None]
    ids[..., 2] += torch.arange(16, device=device)[None, :]
    return ids.reshape(256, 3)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """[n, 4, 32, 32] to [n, 256, 16], 2 x 2 patches as FluxPipeline packs them."""
    n, c, h, w = latents.shape
    return latents.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, c * 4)


def build_vae() -> Any:
    """An autoencoder of 8 x downsampling: [n, 3, 256, 256] in -1..1 to latents [n, 4, 32, 32]."""
    stages = 4
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=256,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
        force_upcast=False,
    )


def build_pipeline(model: TextAndTransformer, vae: Any) -> Any:
    """The trained parts as a pipeline."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=SHIFT, use_dynamic_shifting=False)
    return diffusers.FluxPipeline(
        scheduler=scheduler,
        vae=vae,
        transformer=model.transformer,
        tokenizer=build_tokenizer(WORDS, TEXT_TOKENS),
        text_encoder=model.text_encoder,
        tokenizer_2=build_tokenizer(WORDS, TEXT_TOKENS),
        text_encoder_2=model.text_encoder_2,
    )
