"""Ranks on the CPU over gloo: one group runs many cases, each a whole tiny pipeline against the same on one rank."""

from __future__ import annotations

import json
import multiprocessing
import traceback
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan, HeliosPipeline, HeliosTransformer3DModel
from diffusers.schedulers.scheduling_helios import HeliosScheduler

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

    @property
    def id(self) -> str:
        axes = "-".join(f"{axis}{degree}" for axis, degree in self.axes.items())
        return "-".join([self.family, axes, *(f"{key}={value}" for key, value in self.call.items())])

    @property
    def parallel(self) -> DitParallel:
        return DitParallel.model_validate(self.axes)


def helios() -> HeliosPipeline:
    tok = tiny_dit.tokenizer()
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
        text_encoder=tiny_dit._umt5(len(tok)),
        vae=vae,
        scheduler=HeliosScheduler(stages=1),
        transformer=transformer,
    )


def pipeline(case: Case) -> Any:
    """The family's pipeline with the case's config; the same weights every time, and no bias or norm that does nothing.

    Its random weights are small, so that a text that is read wrongly would hardly show; they are made larger.
    """
    torch.manual_seed(0)
    pipe = helios() if case.family == "helios" else tiny_dit.FAMILIES[case.family]()
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
                parameter *= 2
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: Any, case: Case) -> torch.Tensor:
    """The latents of the case, computed in a thread of its own, as an engine would."""
    arguments = {"prompt": "a fox", "height": 64, "width": 64, "num_inference_steps": 2} | case.call
    found: list[Any] = []

    def run() -> None:
        out = pipe(**arguments, output_type="latent", generator=torch.Generator().manual_seed(1), return_dict=False)
        found.append(out[0])

    thread = Thread(target=run)
    thread.start()
    thread.join()
    return torch.stack(list(found[0]))


def run(case: Case) -> dict[str, float]:
    """The largest difference from the pipeline on one rank, and the largest value."""
    pipe = pipeline(case)
    want = call(pipe, case)
    apply_parallel(pipe, case.parallel, build_mesh(case.parallel, "cpu"))
    got = call(pipe, case)
    if not torch.isfinite(got).all():
        raise ValueError("the output is not finite")
    return {"error": float((got - want).abs().max()), "scale": float(want.abs().max())}


def rank_main(rank: int, cases: list[Case], folder: Path) -> None:
    torch.set_num_threads(1)
    num_ranks = cases[0].parallel.num_ranks
    store = f"file://{folder}/store"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=TIMEOUT_S)
    )
    results: dict[str, Any] = {}
    for case in cases:
        try:
            results[case.id] = run(case)
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
