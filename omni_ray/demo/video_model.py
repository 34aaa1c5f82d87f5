"""The parts of ``demo:video``: a two-expert Wan2.2-architecture pipeline small enough to ship, from random weights."""

from __future__ import annotations

from typing import Any

import diffusers as untyped_diffusers
import torch
from torch import nn
from torch.nn import functional
from transformers import UMT5Config, UMT5EncoderModel

from omni_ray.demo.draw_moving import FRAMES, SIDE
from omni_ray.demo.moving import DIRECTIONS
from omni_ray.demo.scenes import COLOURS, SHAPES, SIZES
from omni_ray.demo.tokens import build_tokenizer, token_table

diffusers: Any = untyped_diffusers  # its classes carry no types

TEXT_TOKENS = 16  # WanTransformer3DModel masks no text, so training and use must agree on it
SHIFT = 3.0  # the scheduler's time shift, s in sigma = s u / (1 + (s - 1) u)
BOUNDARY = 0.875  # sigma from which on the high-noise expert works
UNSAID = 0.1  # the share of captions left out in training, for classifier-free guidance
LATENT_CHANNELS = 8
TEXT_WIDTH = 96
MASKED = -1e9  # added to the attention scores of padding
DEFAULTS = {
    "num_inference_steps": 20,
    "height": SIDE,
    "width": SIDE,
    "num_frames": FRAMES,
    "max_sequence_length": TEXT_TOKENS,
    "guidance_scale": 1.0,
}
WORDS = ["<pad>", "</s>", "<unk>", "a", "an", "on", "background", "moving", *DIRECTIONS, *SIZES, *COLOURS, *SHAPES]


def build_expert() -> Any:
    """A transformer of 320 tokens a clip, whose blocks start as the identity (adaLN-zero, DiT)."""
    expert = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=128,
        ffn_dim=224,
        num_layers=6,
        rope_max_seq_len=64,
    )
    zeroed = [expert.condition_embedder.time_proj, expert.proj_out, *(block.attn2.to_out[0] for block in expert.blocks)]
    for layer in zeroed:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    for block in expert.blocks:
        nn.init.zeros_(block.scale_shift_table)
    return expert


class TextAndExperts(nn.Module):
    """What flow matching trains jointly: the text encoder, the high-noise expert and the low-noise one."""

    unsaid: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(WORDS),
                d_model=TEXT_WIDTH,
                d_kv=24,
                d_ff=128,
                num_layers=2,
                num_heads=4,
                dropout_rate=0.0,
                pad_token_id=0,
                eos_token_id=1,
                is_encoder_decoder=False,
                use_cache=False,
            )
        )
        self.transformer = build_expert()
        self.transformer_2 = build_expert()
        self.register_buffer("unsaid", token_table([""], WORDS, TEXT_TOKENS), persistent=False)

    def text(self, ids: torch.Tensor) -> torch.Tensor:
        """[n, 16] token ids to [n, 16, 96], zero after the end of the text, as WanPipeline makes it.

        The mask is given as what is added to the scores: to make that of a mask of ones and zeros, transformers copies
        a number from the host, which no CUDA graph may hold.
        """
        padding = ids.eq(0)
        found: torch.Tensor = self.text_encoder(ids, padding[:, None, None] * MASKED)[0] * ~padding[..., None]
        return found

    def forward(self, expert: Any, latents: torch.Tensor, sigma: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The velocity noise - data that an expert predicts.

        Args:
            expert: ``transformer`` or ``transformer_2``.
            latents: [n, 8, 5, 16, 16].
            sigma: [n] in 0..1.
            ids: [n, 16] token ids.

        Returns:
            [n, 8, 5, 16, 16].
        """
        velocity: torch.Tensor = expert(
            hidden_states=latents, timestep=1000 * sigma, encoder_hidden_states=self.text(ids), return_dict=False
        )[0]
        return velocity

    def loss(self, latents: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The mean of both experts' squared velocity errors, each at random times of its own range on its own half.

        Args:
            latents: [n, 8, 5, 16, 16] of unit scale; n is even.
            ids: [n, 16] token ids.
        """
        half = len(latents) // 2
        edge = BOUNDARY / (SHIFT - (SHIFT - 1) * BOUNDARY)
        uniform = torch.rand(len(latents), device=latents.device)
        uniform = torch.cat([edge + (1 - edge) * uniform[:half], edge * uniform[half:]])
        sigma = SHIFT * uniform / (1 + (SHIFT - 1) * uniform)
        noise = torch.randn_like(latents)
        level = sigma[:, None, None, None, None]
        mixed = (1 - level) * latents + level * noise
        ids = torch.where(torch.rand(len(ids), 1, device=ids.device) < UNSAID, self.unsaid, ids)
        with torch.autocast(latents.device.type, torch.bfloat16):
            high = self(self.transformer, mixed[:half], sigma[:half], ids[:half])
            low = self(self.transformer_2, mixed[half:], sigma[half:], ids[half:])
        return functional.mse_loss(torch.cat([high, low]).float(), noise - latents)


def build_vae() -> Any:
    """An autoencoder of 8 x 8 x 4 downsampling: [n, 3, 17, 128, 128] in -1..1 to latents [n, 8, 5, 16, 16]."""
    return diffusers.AutoencoderKLWan(
        base_dim=16,
        decoder_base_dim=24,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
    )


def build_pipeline(model: TextAndExperts, vae: Any) -> Any:
    """The trained parts as a pipeline."""
    return diffusers.WanPipeline(
        tokenizer=build_tokenizer(WORDS, TEXT_TOKENS),
        text_encoder=model.text_encoder,
        vae=vae,
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
        ),
        transformer=model.transformer,
        transformer_2=model.transformer_2,
        boundary_ratio=BOUNDARY,
    )
