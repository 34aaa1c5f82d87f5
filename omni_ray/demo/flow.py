"""Flow matching's optimizer: the model, its moving average, one step of both, and the loop until a budget ends."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch

from omni_ray.demo.clock import Budget, learning_rate

EMA_DECAY = 0.999
CHECKPOINT_SECONDS = 120.0


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets every group's learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


class Flow:
    """The model, its moving average and its optimizer. All that a step changes lies on the device, so that a CUDA
    graph can hold the step.

    Args:
        model: on its device; its ``loss(latents, ids)`` is a scalar, its children are called as the pipeline's parts.
        rate: the peak learning rate.
    """

    def __init__(self, model: Any, rate: float) -> None:
        self.model, self.peak_rate, self.num_steps = model, rate, 0
        device = next(model.parameters()).device
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.rate, self.decay = torch.tensor(rate, device=device), torch.tensor(0.0, device=device)
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        rest = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
        cuda = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(groups, lr=self.rate, betas=(0.9, 0.98), fused=cuda, capturable=cuda)

    def next_step(self, fraction: float) -> None:
        """Sets what the next step reads: the learning rate and the moving average's decay."""
        self.rate.fill_(learning_rate(self.peak_rate, fraction, self.num_steps))
        self.decay.fill_(min(EMA_DECAY, (1 + self.num_steps) / (10 + self.num_steps)))
        self.num_steps += 1

    def step(self, latents: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """One step of the optimizer and of the moving average; the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model.loss(latents, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            for mean, value in zip(self.average.parameters(), self.model.parameters(), strict=True):
                mean.lerp_(value, 1 - self.decay)
        detached: torch.Tensor = loss.detach()
        return detached

    def probe(self, latents: torch.Tensor, ids: torch.Tensor) -> bool:
        """Whether the loss and every gradient are finite, on a batch that changes nothing."""
        loss = self.model.loss(latents, ids)
        loss.backward()
        bad = [n for n, p in self.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        self.optimizer.zero_grad(set_to_none=True)
        print(f"probe: loss {loss.item():.4f}, gradients not finite: {bad[:4]}", flush=True)
        return bool(loss.isfinite()) and not bad

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.num_steps,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Takes over a checkpoint."""
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        self.num_steps = state["step"]

    def start_from(self, pipeline: Any) -> None:
        """Takes over a saved pipeline's weights."""
        for target in (self.model, self.average):
            for name, part in target.named_children():
                part.load_state_dict(getattr(pipeline, name).state_dict())

    def run(self, step: Callable[[], torch.Tensor], budget: Budget, print_every: int, save: Callable[[], None]) -> None:
        """Calls ``step`` until the budget ends, and ``save`` every two minutes. SystemExit at a loss that is not
        finite."""
        first, saved = self.num_steps, time.monotonic()
        while budget.left() > 0 or self.num_steps == first:
            self.next_step(budget.fraction())
            loss = step()
            if (self.num_steps - first) % print_every == 0:
                print(f"flow step {self.num_steps} {budget.elapsed():.0f}s loss {loss.item():.4f}", flush=True)
                if not loss.isfinite():
                    raise SystemExit("the loss is not finite")
                if time.monotonic() - saved > CHECKPOINT_SECONDS:
                    save()
                    saved = time.monotonic()


def graphed(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """``step`` as a CUDA graph: launching its thousand kernels one by one takes the host longer than the GPU computes.
    It runs a few times first, so that what the first call makes (optimizer state, compiled code) is there."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    def replay() -> torch.Tensor:
        graph.replay()
        return loss

    return replay
