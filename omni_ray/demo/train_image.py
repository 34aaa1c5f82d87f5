"""Trains ``demo:image`` from nothing: ``python -m omni_ray.demo.train_image --out DIR --checkpoint FILE --seconds N``.

Phases, all within the N seconds: the autoencoder, a pool of encoded scenes, flow matching on it with both text
encoders trained jointly, the autoencoder's decoder once more with the latents as they are, the save in bf16, the
evaluation. With an existing checkpoint it goes on from there; without one but with ``--start DIR`` it starts from that
folder's weights. Where the folder holds the autoencoder (``vae``) alone, it is trained on for ``--vae-seconds``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from omni_ray.demo import draw, scenes
from omni_ray.demo.clock import Budget, learning_rate
from omni_ray.demo.flow import Flow, graphed, set_rate
from omni_ray.demo.image_model import (
    DEFAULTS,
    LATENT_CHANNELS,
    TEXT_TOKENS,
    WORDS,
    TextAndTransformer,
    build_pipeline,
    build_vae,
    diffusers,
)
from omni_ray.demo.pipeline_folder import save_pipeline
from omni_ray.demo.tokens import token_table

KL_WEIGHT = 1e-3


def plan_chunk(job: tuple[int, int]) -> tuple[Any, Any, list[str]]:
    """(count, seed) to plans [count, 2, 4], palette rows [count, 3] and captions of training scenes.

    A default white background is said in one caption of five, so that saying it is understood too.
    """
    count, seed = job
    rng = random.Random(seed)
    found = [scenes.sample(rng) for _ in range(count)]
    captions = [scenes.caption(s, True) if rng.random() < 0.2 else s.caption() for s in found]
    return np.stack([draw.place(s, rng) for s in found]), np.array([draw.colour_indices(s) for s in found]), captions


class Pool:
    """Training scenes on the device, drawn on demand."""

    def __init__(self, plans: Any, colours: Any, captions: list[str]) -> None:
        self.plans = torch.from_numpy(plans)
        self.colours = torch.from_numpy(colours)
        self.ids = token_table(captions, WORDS, TEXT_TOKENS)
        self.palette = torch.from_numpy(draw.PALETTE / 127.5 - 1.0)
        self.table = torch.from_numpy(draw.HALFPLANES)
        self.size = len(captions)

    def to(self, device: torch.device) -> Pool:
        """Moves it."""
        for name in ("plans", "colours", "ids", "palette", "table"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    @classmethod
    def sample(cls, count: int, seed: int) -> Pool:
        """Samples in parallel processes; call it before the GPU is first used (the processes are forked)."""
        workers = max(1, min(8, (os.cpu_count() or 2) // 2))
        jobs = [(count // workers, seed * 1000 + i) for i in range(workers)]
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            parts = pool.map(plan_chunk, jobs)
        captions = [text for part in parts for text in part[2]]
        return cls(np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]), captions)

    def pictures(self, rows: torch.Tensor) -> torch.Tensor:
        """[n] scene numbers to [n, 3, 256, 256] in -1..1."""
        colours = self.palette[self.colours[rows]]
        picture: torch.Tensor = draw.paint(torch, self.plans[rows], colours[:, :2], colours[:, 2], self.table)
        return picture

    def rows(self, count: int) -> torch.Tensor:
        """Random scene numbers [count]."""
        return torch.randint(self.size, (count,), device=self.plans.device)


def train_vae(vae: Any, pool: Pool, budget: Budget, batch: int, rate: float, decoder_only: bool = False) -> None:
    """L1 and squared error, and a small KL term, until the budget ends; then the latents' scale and shift.

    With ``decoder_only`` the latents stay what they are.
    """
    device = pool.plans.device
    vae.to(device=device).train()
    vae.encoder.requires_grad_(not decoder_only)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    step, loss, error = 0, torch.zeros(()), torch.zeros(())
    while budget.left() > 0 or step == 0:
        set_rate(optimizer, learning_rate(rate, budget.fraction(), step, 100))
        with torch.no_grad():
            pictures = pool.pictures(pool.rows(batch))
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(pictures).latent_dist
            made = vae.decode(posterior.sample()).sample
        error = functional.mse_loss(made.float(), pictures)
        kl = posterior.kl().float().mean() / (LATENT_CHANNELS * 32 * 32)
        loss = functional.l1_loss(made.float(), pictures) + error + KL_WEIGHT * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if torch.isfinite(torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)):
            optimizer.step()
        if step % 200 == 0:
            print(
                f"vae step {step} {budget.elapsed():.0f}s loss {loss.item():.4f} mse {error.item():.5f} "
                f"kl {kl.item():.3f}",
                flush=True,
            )
        step += 1
    vae.eval()
    if decoder_only:
        print(f"decoder done: {step} steps, mse {error.item():.5f}", flush=True)
        return
    mean, std = encode(vae, pool, min(pool.size, 64 * batch), batch)[1]
    vae.register_to_config(scaling_factor=1.0 / std, shift_factor=mean)
    print(f"vae done: {step} steps, mse {error.item():.5f}, latent mean {mean:.3f} std {std:.3f}", flush=True)


@torch.no_grad()
def encode(vae: Any, pool: Pool, count: int, batch: int) -> tuple[torch.Tensor, tuple[float, float]]:
    """The first ``count`` scenes' latents [count, 4, 32, 32] bf16, and their mean and deviation.

    They are the posteriors' means: the noise around them is not to be predicted, and the decoder bears it.
    """
    device = pool.plans.device
    parts = []
    for start in range(0, count, batch):
        pictures = pool.pictures(torch.arange(start, min(start + batch, count), device=device))
        with torch.autocast(device.type, torch.bfloat16):
            mean = vae.encode(pictures).latent_dist.mean
        parts.append(mean.to(torch.bfloat16).contiguous())
    means = torch.cat(parts)
    some = means[:4096].float()
    return means, (some.mean().item(), some.std().item())


def save_checkpoint(path: Path, vae: Any, flow: Flow, vae_done: bool) -> None:
    """Writes the checkpoint in one move."""
    part = path.with_suffix(".part")
    scale = (vae.config.scaling_factor, vae.config.shift_factor)
    torch.save({"vae": vae.state_dict(), "scale": scale, "vae_done": vae_done, "flow": flow.state()}, part)
    part.replace(path)


def restore(args: argparse.Namespace, vae: Any, flow: Flow) -> bool:
    """Loads the checkpoint or the starting folder, if there is one; says whether the autoencoder is trained."""
    if args.checkpoint.exists():
        state = torch.load(args.checkpoint, map_location="cpu", weights_only=True)
        vae.load_state_dict(state["vae"])
        vae.register_to_config(scaling_factor=state["scale"][0], shift_factor=state["scale"][1])
        flow.load(state["flow"])
        print(f"resumed at step {flow.num_steps}", flush=True)
        return bool(state["vae_done"])
    if args.start is None:
        return False
    saved = diffusers.AutoencoderKL.from_pretrained(args.start, subfolder="vae")
    vae.load_state_dict(saved.state_dict())
    vae.register_to_config(scaling_factor=saved.config.scaling_factor, shift_factor=saved.config.shift_factor)
    if not (args.start / "transformer").is_dir():
        return False
    flow.start_from(diffusers.FluxPipeline.from_pretrained(args.start))
    return True


def train_flow(flow: Flow, vae: Any, pool: Pool, budget: Budget, args: argparse.Namespace) -> None:
    """Encodes the pool, then trains until the budget ends, with a checkpoint every two minutes."""
    means, _ = encode(vae, pool, min(pool.size, args.pool), args.encode_batch)
    print(f"pool of {len(means)} encoded at {budget.elapsed():.0f}s of the flow budget", flush=True)
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor

    def some() -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.randint(len(means), (args.batch,), device=means.device)
        return (means[rows].float() - shift) * scale, pool.ids[rows]

    if not flow.probe(*some()):
        raise SystemExit("the gradients are not finite")
    if means.is_cuda and not args.no_compile:
        torch._dynamo.config.suppress_errors = True
        flow.model.transformer.compile_repeated_blocks()
        if not flow.probe(*some()):
            raise SystemExit("compiled, the gradients are not finite; train with --no-compile")
    step = graphed(lambda: flow.step(*some())) if means.is_cuda and not args.no_graph else lambda: flow.step(*some())
    print(f"first step at {budget.elapsed():.0f}s", flush=True)
    flow.run(step, budget, args.print_every, lambda: save_checkpoint(args.checkpoint, vae, flow, True))


def arguments() -> argparse.Namespace:
    """The command line."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the pipeline's folder")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="a saved pipeline to start from where there is no checkpoint")
    parser.add_argument("--seconds", type=float, default=540, help="wall clock for everything")
    parser.add_argument("--vae-seconds", type=float, default=70)
    parser.add_argument("--decoder-seconds", type=float, default=100)
    parser.add_argument("--eval-seconds", type=float, default=60, help="kept free for the save and the evaluation")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--pool", type=int, default=262144 if cuda else 512)
    parser.add_argument("--batch", type=int, default=256 if cuda else 16)
    parser.add_argument("--vae-batch", type=int, default=64 if cuda else 4)
    parser.add_argument("--encode-batch", type=int, default=512 if cuda else 8)
    parser.add_argument("--print-every", type=int, default=100 if cuda else 5)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--vae-rate", type=float, default=1e-3)
    parser.add_argument("--eval-count", type=int, default=500)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--no-graph", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Runs every phase."""
    args = arguments()
    total = Budget(args.seconds)
    device = torch.device(args.device)
    seed = int(args.checkpoint.stat().st_mtime) % 10000 if args.checkpoint.exists() else 1
    pool = Pool.sample(args.pool, seed).to(device)
    print(f"{pool.size} scenes sampled in {total.elapsed():.0f}s", flush=True)
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    # With both of these (torch 2.11, H100) the gradients of the causal text encoder were not finite, without them they
    # were; which of the two it is has not been looked into.
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cudnn.benchmark = True
    vae, flow = build_vae(), Flow(TextAndTransformer().to(device), args.rate)
    if not restore(args, vae, flow):
        train_vae(vae, pool, Budget(min(args.vae_seconds, total.left() / 3)), args.vae_batch, args.vae_rate)
        save_checkpoint(args.checkpoint, vae, flow, True)
    vae.to(device=device).eval()
    train_flow(flow, vae, pool, Budget(total.left() - args.eval_seconds - args.decoder_seconds), args)
    if args.decoder_seconds:
        train_vae(vae, pool, Budget(args.decoder_seconds), args.vae_batch, args.vae_rate / 2, decoder_only=True)
    save_checkpoint(args.checkpoint, vae, flow, True)
    pipeline = build_pipeline(flow.average.cpu(), vae.cpu())
    save_pipeline(pipeline.to(torch.bfloat16), args.out, DEFAULTS)
    print(f"saved at {total.elapsed():.0f}s, {flow.num_steps} steps", flush=True)
    del flow, pool
    from omni_ray.demo.evaluate import evaluate_image

    evaluate_image(args.out, args.eval_count, str(device))
    print(f"done at {total.elapsed():.0f}s", flush=True)


if __name__ == "__main__":
    main()
