"""Trains ``demo:video`` from nothing: ``python -m omni_ray.demo.train_video --out DIR --checkpoint FILE --seconds N``.

Phases, all within the N seconds: a rehearsal of the later ones, the autoencoder, a pool of encoded clips, flow
matching on it with the text encoder and both experts trained jointly, the autoencoder's decoder once more with the
latents as they are, the save in bf16, the evaluation. With an existing checkpoint it goes on from there: then the
autoencoder's latents stay as they are.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from omni_ray.demo import draw, draw_moving, moving
from omni_ray.demo.clock import Budget, learning_rate
from omni_ray.demo.flow import Flow, graphed
from omni_ray.demo.pipeline_folder import save_pipeline
from omni_ray.demo.scenes import default_background
from omni_ray.demo.tokens import token_table
from omni_ray.demo.video_model import (
    DEFAULTS,
    LATENT_CHANNELS,
    TEXT_TOKENS,
    WORDS,
    TextAndExperts,
    build_pipeline,
    build_vae,
)

KL_WEIGHT = 1e-3
UNSAID_BACKGROUNDS = 3  # rows that leave a default background unsaid, to one that says it


class Clips:
    """The training scenes on the device: a row for each caption, drawn on demand with paths that vary.

    Default backgrounds have several rows each, so that four rows of ten have one.
    """

    def __init__(self, device: torch.device, seed: int) -> None:
        rows: list[tuple[moving.MovingScene, bool]] = []
        for scene in moving.every_scene(held=False):
            rows.append((scene, True))
            if scene.frame.background == default_background(scene.frame.items):
                rows += [(scene, False)] * UNSAID_BACKGROUNDS
        random.Random(seed).shuffle(rows)
        self.device, self.size = device, len(rows)
        self.forms = torch.tensor([draw_moving.form(scene) for scene, _ in rows], device=device)
        self.colours = torch.tensor([draw_moving.colour_indices(scene) for scene, _ in rows], device=device)
        self.ids = token_table([moving.caption(*row) for row in rows], WORDS, TEXT_TOKENS).to(device)
        self.palette = torch.from_numpy(draw.PALETTE / 127.5 - 1.0).to(device)
        self.table = torch.from_numpy(draw.HALFPLANES).to(device)

    def rows(self, count: int) -> torch.Tensor:
        """Random row numbers [count]."""
        return torch.randint(self.size, (count,), device=self.device)

    def draw(self, rows: torch.Tensor) -> torch.Tensor:
        """[n] row numbers to [n, 3, 17, 128, 128] in -1..1."""
        jitter = torch.rand(len(rows), 3, device=self.device)
        colours = self.palette[self.colours[rows]]
        clips: torch.Tensor = draw_moving.paint(torch, self.forms[rows], jitter, colours, self.table)
        return clips


@dataclass(frozen=True)
class Setting:
    """How this machine runs the autoencoder's convolutions; it changes the speed, not what is learnt."""

    dtype: torch.dtype = torch.float32
    layout: torch.memory_format = torch.contiguous_format
    graph: bool = False

    def apply(self, vae: Any) -> None:
        """Gives the weights of the three-dimensional convolutions this layout."""
        for module in vae.modules():
            if isinstance(module, nn.Conv3d):
                module.weight.data = module.weight.data.contiguous(memory_format=self.layout)

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context to encode and decode in."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.dtype is torch.bfloat16)


def vae_loss(vae: Any, clips: torch.Tensor, setting: Setting) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and the mean squared error in it.

    L1 and squared error, a small KL term, and what the decoder makes outside -1..1: AutoencoderKLWan clamps its
    output, and a clamped value has no gradient.
    """
    outside: list[torch.Tensor] = []
    hook = vae.decoder.register_forward_hook(lambda *args: outside.append((args[2].abs() - 1).clamp(min=0).mean()))
    with setting.autocast(clips.device):
        posterior = vae.encode(clips).latent_dist
        made = vae.decode(posterior.sample()).sample.float()
    hook.remove()
    error = functional.mse_loss(made, clips)
    kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
    loss = functional.l1_loss(made, clips) + error + KL_WEIGHT * kl + torch.stack(outside).float().mean()
    return loss, error


def vae_stepper(vae: Any, clips: Clips, batch: int, rate: torch.Tensor, setting: Setting) -> Callable[[], torch.Tensor]:
    """A call that trains one step at the ``rate`` and returns [3]: loss, squared error, the gradients' norm."""
    setting.apply(vae)
    cuda = clips.device.type == "cuda"
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.0, fused=cuda, capturable=cuda
    )

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss, error = vae_loss(vae, clips.draw(clips.rows(batch)), setting)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        return torch.stack([loss.detach(), error.detach(), norm])

    return graphed(step) if setting.graph else step


def fastest(clips: Clips, batch: int, graph: bool) -> Setting:
    """The setting of fewest seconds a step, measured on throwaway copies; SystemExit where none gives finite figures.

    Which one it is hangs on the GPU and the release of cuDNN.
    """
    if clips.device.type != "cuda":
        return Setting()
    seconds: dict[Setting, float] = {}
    for dtype in (torch.bfloat16, torch.float32):
        for layout in (torch.channels_last_3d, torch.contiguous_format):
            setting, rate = Setting(dtype, layout, graph), torch.tensor(1e-4, device=clips.device)
            step = vae_stepper(build_vae().to(clips.device), clips, batch, rate, setting)
            figures = [step().clone() for _ in range(3)]
            torch.cuda.synchronize()
            begin = time.monotonic()
            figures += [step().clone() for _ in range(5)]
            torch.cuda.synchronize()
            finite = bool(torch.stack(figures).isfinite().all())
            print(f"{setting}: {(time.monotonic() - begin) / 5:.3f}s a step, finite: {finite}", flush=True)
            if finite:
                seconds[setting] = time.monotonic() - begin
    if not seconds:
        raise SystemExit("the autoencoder's gradients are not finite in any setting")
    return min(seconds, key=lambda setting: seconds[setting])


def train_vae(
    vae: Any, clips: Clips, budget: Budget, args: argparse.Namespace, setting: Setting, decoder_only: bool = False
) -> None:
    """Trains the autoencoder until the budget ends, then measures the latents' mean and deviation.

    With ``decoder_only`` the latents stay what they are. SystemExit at gradients that are not finite.
    """
    peak = args.vae_rate / 2 if decoder_only else args.vae_rate
    vae.train()
    vae.encoder.requires_grad_(not decoder_only)
    rate = torch.tensor(peak / 100, device=clips.device)
    step = vae_stepper(vae, clips, args.vae_batch, rate, setting)
    count = 0
    while budget.left() > 0 or count == 0:
        rate.fill_(learning_rate(peak, budget.fraction(), count, 100))
        figures = step()
        if count % args.print_every == 0:
            loss, error, norm = figures.tolist()
            print(f"vae step {count} {budget.elapsed():.0f}s loss {loss:.4f} mse {error:.5f}", flush=True)
            if not math.isfinite(norm):
                raise SystemExit("the autoencoder's gradients are not finite")
        count += 1
    vae.eval()
    print(f"{'decoder' if decoder_only else 'vae'} done: {count} steps, mse {figures[1].item():.5f}", flush=True)
    if not decoder_only:
        some = encode(vae, clips, clips.rows(min(args.pool, 2048)), args.encode_batch, setting).float()
        mean, std = some.mean((0, 2, 3, 4)), some.std((0, 2, 3, 4))
        vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
        print(f"latents: mean {mean.tolist()}, deviation {std.tolist()}", flush=True)


@torch.no_grad()
def encode(vae: Any, clips: Clips, rows: torch.Tensor, batch: int, setting: Setting) -> torch.Tensor:
    """The latents [n, 8, 5, 16, 16] bf16 of clips drawn for the rows [n].

    They are the posteriors' means: the noise around them is not to be predicted, and the decoder bears it.
    """
    parts = []
    for some in rows.split(batch):
        with setting.autocast(clips.device):
            parts.append(vae.encode(clips.draw(some)).latent_dist.mean.to(torch.bfloat16).contiguous())
    return torch.cat(parts)


def stepper(flow: Flow, some: Callable[[], tuple[torch.Tensor, torch.Tensor]], graph: bool) -> Callable[[], Any]:
    """A call that trains one step on ``some()``; SystemExit where a gradient is not finite."""
    if not flow.probe(*some()):
        raise SystemExit("the gradients are not finite")
    return graphed(lambda: flow.step(*some())) if graph else lambda: flow.step(*some())


def rehearse(clips: Clips, args: argparse.Namespace, graph: bool) -> Setting:
    """Steps of throwaway copies, so that what cannot run on this machine fails before the long phases; the
    autoencoder's fastest setting."""
    setting = fastest(clips, args.vae_batch, graph)
    latents = torch.randn(args.batch, LATENT_CHANNELS, 5, 16, 16, device=clips.device)
    ids = clips.ids[clips.rows(args.batch)]
    step = stepper(Flow(TextAndExperts().to(clips.device), args.rate), lambda: (latents, ids), graph)
    losses = [step().item() for _ in range(3)]
    begin = time.monotonic()
    losses += [step().item() for _ in range(3)]
    seconds = (time.monotonic() - begin) / 3
    print(f"rehearsed: {setting}; flow {seconds:.3f}s a step, losses {losses}", flush=True)
    return setting


def train_flow(flow: Flow, vae: Any, clips: Clips, budget: Budget, args: argparse.Namespace, setting: Setting) -> None:
    """Encodes the pool, then trains until the budget ends, with a checkpoint every two minutes."""
    rows = clips.rows(args.pool)
    pool = encode(vae, clips, rows, args.encode_batch, setting)
    print(f"pool of {len(pool)} encoded at {budget.elapsed():.0f}s of the flow budget", flush=True)
    mean, std = (
        torch.tensor(value, device=clips.device)[None, :, None, None, None]
        for value in (vae.config.latents_mean, vae.config.latents_std)
    )

    def some() -> tuple[torch.Tensor, torch.Tensor]:
        picked = torch.randint(len(pool), (args.batch,), device=clips.device)
        return (pool[picked].float() - mean) / std, clips.ids[rows[picked]]

    step = stepper(flow, some, setting.graph)
    flow.run(step, budget, args.print_every, lambda: save_checkpoint(args.checkpoint, vae, flow))


def save_checkpoint(path: Path, vae: Any, flow: Flow) -> None:
    """Writes the checkpoint in one move."""
    part = path.with_suffix(".part")
    scale = {name: vae.config[name] for name in ("latents_mean", "latents_std")}
    torch.save({"vae": vae.state_dict(), "scale": scale, "flow": flow.state()}, part)
    part.replace(path)


def restore(path: Path, vae: Any, flow: Flow) -> bool:
    """Loads the checkpoint, if there is one; says whether there was."""
    if not path.exists():
        return False
    state = torch.load(path, map_location="cpu", weights_only=True)
    vae.load_state_dict(state["vae"])
    vae.register_to_config(**state["scale"])
    flow.load(state["flow"])
    print(f"resumed at step {flow.num_steps}", flush=True)
    return True


def arguments() -> argparse.Namespace:
    """The command line."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the pipeline's folder")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=540, help="wall clock for everything")
    parser.add_argument("--vae-seconds", type=float, default=120)
    parser.add_argument("--decoder-seconds", type=float, default=60)
    parser.add_argument("--eval-seconds", type=float, default=80, help="kept free for the save and the evaluation")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--pool", type=int, default=98304 if cuda else 256)
    parser.add_argument("--batch", type=int, default=256 if cuda else 8, help="even: half for each expert")
    parser.add_argument("--vae-batch", type=int, default=16 if cuda else 2)
    parser.add_argument("--encode-batch", type=int, default=128 if cuda else 8)
    parser.add_argument("--print-every", type=int, default=100 if cuda else 5)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--vae-rate", type=float, default=1e-3)
    parser.add_argument("--eval-count", type=int, default=200)
    parser.add_argument("--no-graph", action="store_true", help="launch a step's kernels one by one")
    args = parser.parse_args()
    if args.batch % 2:
        parser.error(f"--batch {args.batch} is odd, and each expert takes half of it; give an even number")
    return args


def main() -> None:
    """Runs every phase."""
    args = arguments()
    total, device = Budget(args.seconds), torch.device(args.device)
    graph = device.type == "cuda" and not args.no_graph
    seed = int(args.checkpoint.stat().st_mtime) % 10000 if args.checkpoint.exists() else 1
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    # As in train_image: with these two (torch 2.11, H100) gradients of a text encoder were not finite.
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    clips = Clips(device, seed)
    print(f"{clips.size} captions at {total.elapsed():.0f}s", flush=True)
    setting = rehearse(clips, args, graph)
    print(f"rehearsed at {total.elapsed():.0f}s", flush=True)
    vae, flow = build_vae().to(device), Flow(TextAndExperts().to(device), args.rate)
    if not restore(args.checkpoint, vae, flow):
        train_vae(vae, clips, Budget(min(args.vae_seconds, total.left() / 2)), args, setting)
        save_checkpoint(args.checkpoint, vae, flow)
    vae.eval()
    setting.apply(vae)
    train_flow(flow, vae, clips, Budget(total.left() - args.eval_seconds - args.decoder_seconds), args, setting)
    save_checkpoint(args.checkpoint, vae, flow)
    if args.decoder_seconds:
        train_vae(vae, clips, Budget(args.decoder_seconds), args, setting, decoder_only=True)
        save_checkpoint(args.checkpoint, vae, flow)
    Setting().apply(vae)  # safetensors takes the plain layout alone
    pipeline = build_pipeline(copy.deepcopy(flow.average).cpu(), vae.cpu())
    save_pipeline(pipeline.to(torch.bfloat16), args.out, DEFAULTS)
    print(f"saved at {total.elapsed():.0f}s, {flow.num_steps} steps", flush=True)
    del flow, clips
    from omni_ray.demo.evaluate import evaluate_video

    evaluate_video(args.out, args.eval_count, str(device))
    print(f"done at {total.elapsed():.0f}s", flush=True)


if __name__ == "__main__":
    main()
