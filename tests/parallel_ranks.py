"""Ranks on the CPU over gloo: one group runs many cases, each a whole tiny pipeline against the same on one rank."""

from __future__ import annotations

import copy
import json
import multiprocessing
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image

from omni_ray.accel.modules import transformers_of
from omni_ray.accel.parallel import apply_parallel, build_mesh
from omni_ray.config.spec import DitParallel
from tests import tiny_dit

TIMEOUT_S = 60


@dataclass(frozen=True)
class Case:
    """A pipeline's family, the axes, the arguments of its call, and what its transformers' configs have instead."""

    family: str
    axes: dict[str, int]
    call: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    compile: bool = False

    @property
    def id(self) -> str:
        axes = "-".join(f"{axis}{degree}" for axis, degree in self.axes.items())
        return "-".join([self.family, axes, *self.call, *(["compiled"] if self.compile else [])])

    @property
    def parallel(self) -> DitParallel:
        return DitParallel.model_validate(self.axes)


def pipeline(case: Case) -> Any:
    """The family's pipeline with the case's config; the same weights every time, and no bias or norm that does nothing.

    Fresh weights are small, so that a text that is read wrongly would hardly show; they are made larger.
    """
    torch.manual_seed(0)
    pipe = tiny_dit.FAMILIES[case.family]()
    for name, transformer in transformers_of(pipe).items():
        pipe.register_modules(**{name: type(transformer).from_config(dict(transformer.config) | case.config)})
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    for transformer in transformers_of(pipe).values():
        for name, parameter in transformer.named_parameters():
            if "pad_token" in name:
                parameter.normal_()
            elif parameter.dim() == 1:
                parameter += 0.3 * torch.randn_like(parameter)
            else:
                parameter *= 1.5
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: Any, case: Case) -> torch.Tensor:
    """The latents of the case, computed in a thread of its own, as an engine would."""
    arguments = {"prompt": "a fox", "height": 48, "width": 80, "num_inference_steps": 2}
    arguments |= copy.deepcopy(case.call)  # Z-Image's pipeline writes into the list of prompts
    if case.family == "wan_i2v":
        arguments["image"] = Image.new("RGB", (80, 48), "orange")

    def run() -> Any:
        return pipe(**arguments, output_type="latent", generator=torch.Generator().manual_seed(1), return_dict=False)

    with ThreadPoolExecutor(1) as thread:
        return torch.stack(list(thread.submit(run).result()[0]))


class Rank:
    """One rank's process. What cases share, a mesh or the latents of one rank, is made once."""

    def __init__(self) -> None:
        self.mesh = lru_cache(lambda axes: build_mesh(DitParallel.model_validate(dict(axes)), "cpu"))
        self.pipes: dict[str, Any] = {}
        self.wanted: dict[str, torch.Tensor] = {}

    def run(self, case: Case) -> dict[str, float]:
        """The largest difference from the pipeline on one rank, and the largest value."""
        pipe = self._pipe(case)
        key = repr((case.family, case.call, case.config))
        if key not in self.wanted:
            self.wanted[key] = call(pipe, case)
        apply_parallel(pipe, case.parallel, self.mesh(tuple(case.axes.items())))
        if case.compile:
            for transformer in transformers_of(pipe).values():
                transformer.compile_repeated_blocks(backend="eager", fullgraph=True, dynamic=True)
        got, want = call(pipe, case), self.wanted[key]
        if not torch.isfinite(got).all():
            raise ValueError("the output is not finite")
        return {"error": float((got - want).abs().max()), "scale": float(want.abs().max())}

    def _pipe(self, case: Case) -> Any:
        """A pipeline whose transformers no other case has touched."""
        key = repr((case.family, case.config))
        if key not in self.pipes:
            self.pipes[key] = pipeline(case)
        pipe = copy.copy(self.pipes[key])
        pipe.register_modules(**{name: copy.deepcopy(module) for name, module in transformers_of(pipe).items()})
        return pipe


def rank_main(rank: int, cases: list[Case], folder: Path) -> None:
    torch.set_num_threads(1)
    store, num_ranks = f"file://{folder}/store", cases[0].parallel.num_ranks
    timeout = timedelta(seconds=TIMEOUT_S)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=num_ranks, timeout=timeout)
    process = Rank()
    results: dict[str, Any] = {}
    for case in cases:
        try:
            results[case.id] = process.run(case)
        except Exception:
            results[case.id] = traceback.format_exc()
            break  # the others may wait for this rank, which is out of step now
    (folder / f"{rank}.json").write_text(json.dumps(results))
    if len(results) == len(cases):
        dist.barrier()
    dist.destroy_process_group()


def run_cases(cases: list[Case], folder: Path) -> dict[str, list[Any]]:
    """Per case, each rank's result: numbers, or a traceback as text. All cases have one number of ranks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    num_ranks = cases[0].parallel.num_ranks
    processes = [context.Process(target=rank_main, args=(rank, cases, folder)) for rank in range(num_ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(num_ranks)]
    return {case.id: [results.get(case.id, "not run") for results in ranks] for case in cases}
