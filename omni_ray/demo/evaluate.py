"""Measures a demo model on held-out requests (500, of video 200) and writes its card.

``python -m omni_ray.demo.evaluate image|video|chat [FOLDER] [--count N] [--device cpu|cuda] [--card]``
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from omni_ray.demo import check_moving, moving, phrases, resolve, scenes
from omni_ray.demo.card import chat_card, image_card, video_card
from omni_ray.demo.check import reasons

CATEGORIES = ("unreadable", "count", "shape", "colour", "size", "relation", "direction", "background")


def hardware(device: str) -> str:
    """The name of what runs the model."""
    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name())
    model = (
        [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        if os.path.exists("/proc/cpuinfo")
        else []
    )
    name = model[0].split(":", 1)[1].strip() if model else platform.processor()
    return f"{name}, {torch.get_num_threads()} threads"


def _share(right: list[bool]) -> str:
    return f"{100 * sum(right) / len(right):.1f}% of {len(right)}" if right else "none of 0"


def _measured(
    pipeline: Any,
    wanted: Sequence[Any],
    batch: int,
    draw: Callable[[list[str], list[torch.Generator]], Sequence[Any]],
    check: Callable[[Any, Any], dict[str, str]],
    sorts: dict[str, Callable[[Any], bool]],
) -> dict[str, Any]:
    """Draws the captions of the scenes, and checks what came. ``sorts`` are those whose shares are told apart."""
    pipeline.set_progress_bar_config(disable=True)
    wrong: list[dict[str, str]] = []
    drawing = 0.0
    for start in range(0, len(wanted), batch):
        some = wanted[start : start + batch]
        seeds = [torch.Generator("cpu").manual_seed(start + i) for i in range(len(some))]
        begin = time.monotonic()
        made = draw([scene.caption() for scene in some], seeds)
        drawing += time.monotonic() - begin
        wrong += [check(each, scene) for each, scene in zip(made, some, strict=True)]
    pairs = list(zip(wrong, wanted, strict=True))
    failures = Counter(name for row in wrong for name in row)
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    return {
        "right": sum(not row for row in wrong) / len(wanted),
        "all": _share([not row for row in wrong]),
        **{sort: _share([not row for row, scene in pairs if is_one(scene)]) for sort, is_one in sorts.items()},
        "failures": {name: failures[name] for name in CATEGORIES},
        "seconds": drawing / len(wanted),
        "params": {name: sum(p.numel() for p in part.parameters()) for name, part in sorted(parts.items())},
        "examples": [f"{scene.caption()}: {row}" for row, scene in pairs if row][:12],
    }


def run_image(folder: Path, count: int, device: str, dtype: torch.dtype, batch: int) -> dict[str, Any]:
    """Draws ``count`` held-out captions at the folder's defaults and checks the pictures."""
    from omni_ray.demo.image_model import DEFAULTS, diffusers

    pipe = diffusers.FluxPipeline.from_pretrained(folder, torch_dtype=dtype).to(device)
    sorts = {"one shape": lambda scene: scene.relation is None, "two shapes": lambda scene: scene.relation is not None}

    def draw(captions: list[str], seeds: list[torch.Generator]) -> Any:
        return pipe(captions, generator=seeds, **DEFAULTS).images

    return _measured(pipe, scenes.held_out_scenes(count), batch, draw, reasons, sorts)


def run_video(folder: Path, count: int, device: str, dtype: torch.dtype, batch: int) -> dict[str, Any]:
    """Films ``count`` held-out captions at the folder's defaults and checks the clips."""
    from omni_ray.demo.video_model import DEFAULTS, diffusers

    pipe = diffusers.WanPipeline.from_pretrained(folder, torch_dtype=dtype).to(device)
    sorts = {"moving": lambda scene: bool(scene.direction), "still": lambda scene: not scene.direction}

    def film(captions: list[str], seeds: list[torch.Generator]) -> Any:
        return pipe(captions, generator=seeds, output_type="pil", **DEFAULTS).frames

    return _measured(pipe, moving.held_out_scenes(count), batch, film, check_moving.reasons, sorts)


def _evaluate(
    name: str,
    run: Callable[[Path, int, str, torch.dtype, int], dict[str, Any]],
    write: Callable[[dict[str, Any]], str],
    folder: Path,
    count: int,
    device: str,
    card: bool,
    dtype_name: str,
) -> float:
    batch = 50 if device.startswith("cuda") else 1
    figures = run(folder, count, device, getattr(torch, dtype_name), batch)
    figures |= {"hardware": hardware(device), "batch": batch, "dtype": dtype_name}
    print(f"{name}: {figures}", flush=True)
    if card:
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        cpu = run(folder, 3, "cpu", torch.float32, 1)
        figures |= {"cpu_seconds": cpu["seconds"], "cpu": hardware("cpu")}
        torch.set_num_threads(threads)
        (folder / "README.md").write_text(write(figures))
    return float(figures["right"])


def evaluate_image(folder: Path, count: int, device: str, card: bool = True, dtype_name: str = "bfloat16") -> float:
    """Measures ``demo:image``, prints the figures, writes the card; the share that is right, 0..1."""
    return _evaluate("image", run_image, image_card, folder, count, device, card, dtype_name)


def evaluate_video(folder: Path, count: int, device: str, card: bool = True, dtype_name: str = "bfloat16") -> float:
    """Measures ``demo:video``, prints the figures, writes the card; the share that is right, 0..1."""
    return _evaluate("video", run_video, video_card, folder, count, device, card, dtype_name)


@torch.inference_mode()
def answers(model: Any, tokenizer: Any, conversations: list[list[dict[str, str]]], batch: int) -> list[str]:
    """The greedy answer to each conversation."""
    found: list[str] = []
    tokenizer.padding_side = "left"
    for start in range(0, len(conversations), batch):
        texts = [
            tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True)
            for c in conversations[start : start + batch]
        ]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
        made = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=48,
            do_sample=False,
            top_k=None,
        )
        found += tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in found]


def _chat_sets(count: int) -> dict[str, list[tuple[list[dict[str, str]], str]]]:
    """Held-out requests alone, after a system message, in capitals, as a later turn, and plain captions."""
    pairs = phrases.held_out_pairs(count)
    few = pairs[: max(1, count // 5)]
    system = {"role": "system", "content": "You are a helpful assistant."}

    def user(text: str) -> dict[str, str]:
        return {"role": "user", "content": text}

    before = pairs[-len(few) :]
    return {
        "held-out requests": [([user(t)], c) for t, c in pairs],
        "the same after a system message": [([system, user(t)], c) for t, c in few],
        "the same in capitals": [([user(t.upper())], c) for t, c in few],
        "as a second turn": [
            ([user(p), {"role": "assistant", "content": a}, user(t)], c)
            for (p, a), (t, c) in zip(before, few, strict=True)
        ],
        "plain held-out captions": [([user(s.caption())], s.caption()) for s in scenes.held_out_scenes(len(few))],
    }


def evaluate_chat(folder: Path, count: int, device: str, card: bool = True, dtype_name: str = "bfloat16") -> float:
    """Measures ``demo:chat``, prints the figures, writes the card; the share of held-out requests right, 0..1."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype_name))
    model = model.to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = 128 if device.startswith("cuda") else 16
    figures: dict[str, Any] = {"hardware": hardware(device), "dtype": dtype_name, "sets": {}}
    share = 0.0
    for name, rows in _chat_sets(count).items():
        begin = time.monotonic()
        got = answers(model, tokenizer, [conversation for conversation, _ in rows], batch)
        right = [a == caption for a, (_, caption) in zip(got, rows, strict=True)]
        figures["sets"][name] = _share(right)
        if name == "held-out requests":
            share = sum(right) / len(right)
            figures["seconds"] = (time.monotonic() - begin) / len(rows)
            figures["wrong"] = [
                f"{c[-1]['content']} -> {a} (wanted: {w})" for a, (c, w) in zip(got, rows, strict=True) if a != w
            ][:12]
    figures["params"] = sum(p.numel() for p in model.parameters())
    print(f"chat: {figures}", flush=True)
    if card:
        (folder / "README.md").write_text(chat_card(figures))
    return share


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=("image", "video", "chat"))
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--count", type=int, help="requests; 500, of video 200")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--card", action="store_true", help="rewrite the folder's README.md")
    args = parser.parse_args()
    run = {"image": evaluate_image, "video": evaluate_video, "chat": evaluate_chat}[args.model]
    count = args.count or (200 if args.model == "video" else 500)
    run(args.folder or resolve(args.model), count, args.device, args.card, args.dtype)


if __name__ == "__main__":
    main()
