"""Trains ``demo:chat`` from nothing: ``python -m omni_ray.demo.train_chat --out DIR --checkpoint FILE --seconds N``.

Samples requests, learns the tokenizer, trains on the answers' tokens alone within the N seconds, saves in bf16 and
evaluates. With an existing checkpoint it goes on from there.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import os
import random
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from omni_ray.demo import phrases, scenes
from omni_ray.demo.chat_model import build_model, build_tokenizer, save_chat
from omni_ray.demo.clock import Budget, learning_rate

EMA_DECAY = 0.999
IGNORED = -100  # the label of a token that is not trained on
Turns = list[tuple[str, str]]


def chunk(job: tuple[int, int]) -> list[Turns]:
    """(count, seed) to conversations of (request, caption): three in four of one turn, else two."""
    count, seed = job
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        turns = [_turn(rng)]
        if rng.random() < 0.25:
            turns.append(_turn(rng))
        found.append(turns)
    return found


def _turn(rng: random.Random) -> tuple[str, str]:
    """One training pair; a plain caption whose scene is held out is kept out as well."""
    while True:
        text, caption = phrases.sample(rng)
        if not (text.lower().strip(" .!?") == caption and scenes.held_out(scenes.parse(caption))):
            return text, caption


def sample(count: int, seed: int) -> list[Turns]:
    """Conversations, sampled in parallel processes; call it before the GPU is first used (they are forked)."""
    workers = max(1, min(8, (os.cpu_count() or 2) // 2))
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        parts = pool.map(chunk, [(count // workers, seed * 1000 + i) for i in range(workers)])
    return [turns for part in parts for turns in part]


def encode(tokenizer: PreTrainedTokenizerFast, conversations: list[Turns], length: int) -> tuple[Any, Any]:
    """Token ids and labels, both [conversations, length] int16; longer conversations are left out.

    Written as the chat template writes them; only answers and their end token are labelled.
    """
    ids = torch.zeros(len(conversations), length, dtype=torch.int16)
    labels = torch.full_like(ids, IGNORED)
    pieces = [
        p
        for turns in conversations
        for q, a in turns
        for p in (f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n", f"{a}<|im_end|>", "\n")
    ]
    coded = iter(tokenizer(pieces, add_special_tokens=False)["input_ids"])
    row = 0
    for turns in conversations:
        tokens: list[int] = []
        wanted: list[int] = []
        for part in range(3 * len(turns)):
            piece = next(coded)
            tokens += piece
            wanted += piece if part % 3 == 1 else [IGNORED] * len(piece)
        if len(tokens) <= length:
            ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int16)
            labels[row, : len(wanted)] = torch.tensor(wanted, dtype=torch.int16)
            row += 1
    print(f"{row} of {len(conversations)} conversations fit {length} tokens", flush=True)
    return ids[:row], labels[:row]


def loss_of(model: Qwen3ForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy over the labelled tokens; ids and labels [batch, length] int64. Padding is on the right, so the
    causal mask alone keeps it out.
    """
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits
    return functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def train(
    model: Qwen3ForCausalLM, state: dict[str, Any], data: tuple[Any, Any], args: argparse.Namespace, budget: Budget
) -> Qwen3ForCausalLM:
    """Trains until the budget ends and returns the moving average of the weights."""
    ids, labels = data
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, betas=(0.9, 0.98), weight_decay=0.01)
    step = 0
    if state:
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    first, saved, window = step, time.monotonic(), torch.zeros((), device=ids.device)
    while budget.left() > 0 or step == first:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args.rate, budget.fraction(), step)
        rows = torch.randint(len(ids), (args.batch,), device=ids.device)
        loss = loss_of(model, ids[rows].long(), labels[rows].long())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            decay = min(EMA_DECAY, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        step += 1
        window += loss.detach()
        if (step - first) % args.print_every == 0:
            print(f"chat step {step} {budget.elapsed():.0f}s loss {window.item() / args.print_every:.5f}", flush=True)
            window.zero_()
        if time.monotonic() - saved > 120:
            save_checkpoint(args.checkpoint, model, average, optimizer, step)
            saved = time.monotonic()
    save_checkpoint(args.checkpoint, model, average, optimizer, step)
    return average


def save_checkpoint(path: Path, model: Any, average: Any, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Writes the checkpoint in one move; the tokenizer lies beside it."""
    part = path.with_suffix(".part")
    torch.save(
        {
            "model": model.state_dict(),
            "average": average.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
        },
        part,
    )
    part.replace(path)


def arguments() -> argparse.Namespace:
    """The command line."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the model's folder")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=300, help="wall clock for everything")
    parser.add_argument("--eval-seconds", type=float, default=30, help="kept free for the save and the evaluation")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--count", type=int, default=300000 if cuda else 20000)
    parser.add_argument("--length", type=int, default=160, help="tokens a training conversation")
    parser.add_argument("--batch", type=int, default=256 if cuda else 16)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--print-every", type=int, default=250 if cuda else 20)
    parser.add_argument("--eval-count", type=int, default=500)
    return parser.parse_args()


def main() -> None:
    """Runs every phase."""
    args = arguments()
    total, state = Budget(args.seconds), {}
    tokens = args.checkpoint.with_suffix(".tokenizer")
    if args.checkpoint.exists():
        state = torch.load(args.checkpoint, map_location="cpu", weights_only=True)
    conversations = sample(args.count, 1 + state.get("step", 0))
    print(f"{len(conversations)} conversations sampled in {total.elapsed():.0f}s", flush=True)
    if state:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tokens)
    else:
        tokenizer = build_tokenizer([text for turns in conversations[:50000] for turn in turns for text in turn])
        tokenizer.save_pretrained(tokens)
    torch.manual_seed(1 + state.get("step", 0))
    torch.set_float32_matmul_precision("high")
    ids, labels = encode(tokenizer, conversations, args.length)
    print(f"encoded at {total.elapsed():.0f}s", flush=True)
    model = build_model().to(args.device)
    if state:
        model.load_state_dict(state["model"])
    data = (ids.to(args.device), labels.to(args.device))
    average = train(model, state, data, args, Budget(total.left() - args.eval_seconds))
    save_chat(average.bfloat16(), tokenizer, args.out)
    print(f"saved at {total.elapsed():.0f}s", flush=True)
    from omni_ray.demo.evaluate import evaluate_chat

    evaluate_chat(args.out, args.eval_count, args.device)
    print(f"done at {total.elapsed():.0f}s", flush=True)


if __name__ == "__main__":
    main()
