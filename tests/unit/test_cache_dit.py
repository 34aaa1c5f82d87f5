"""Cache-DiT in the engine: interleaved requests skip as they do alone, and nothing of one is left for the next."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from diffusers import DiffusionPipeline

from omni_ray.accel.apply import Accelerators, accelerate
from omni_ray.config.spec import Batching, DitGroup
from omni_ray.engine.loop import EngineLoop
from omni_ray.errors import ConfigError
from omni_ray.messages import Job
from tests.lanes import assert_skips_as_alone, run_lanes, usage
from tests.ranks import CPU, jobs_of, load

FAMILIES = ("flux", "flux2", "qwen_image", "hunyuan_image", "z_image", "wan", "helios")
EAGER = {
    "Fn_compute_blocks": 1,
    "max_warmup_steps": 1,
    "residual_diff_threshold": 1e9,
    "max_continuous_cached_steps": 2,
}


def cached(folder: Any, kind: str = "cache_dit", **options: Any) -> tuple[DiffusionPipeline, Accelerators]:
    pipe = load(folder)
    cache: dict[str, Any] = {"kind": kind, "cache_dit": EAGER | options}
    cache |= {"threshold": 1e9, "max_consecutive_skips": 1, "coefficients": (1.0, 0.0)} if kind == "both" else {}
    group = DitGroup.model_validate({"type": "dit", "name": "m", "source": "x", "cache": cache})
    return pipe, accelerate(pipe, group, CPU)


def serve(made: tuple[DiffusionPipeline, Accelerators], jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> Any:
    pipe, accelerators = made
    return run_lanes(EngineLoop(pipe, Batching(max_num_seqs=8), accelerators=accelerators), jobs, monkeypatch)


@pytest.mark.parametrize("kind", ["cache_dit", "both"])
@pytest.mark.parametrize("family", FAMILIES)
def test_lanes_side_by_side_skip_as_they_do_alone(
    family: str, kind: str, tiny_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, jobs = cached(tiny_folder(family), kind), jobs_of(family)[:5]
    assert_skips_as_alone(lambda some: serve(made, some, monkeypatch), jobs)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_threshold_of_zero_changes_nothing(
    family: str, tiny: Any, tiny_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = jobs_of(family)[:2]
    wanted, _ = run_lanes(EngineLoop(tiny(family), Batching()), jobs, monkeypatch)
    images, events = serve(cached(tiny_folder(family), residual_diff_threshold=0.0), jobs, monkeypatch)
    for job in jobs:
        assert np.abs(images[job.id] - wanted[job.id]).max() < 1e-5
        assert usage(events[job.id]).steps_skipped == 0


def test_a_mask_says_which_steps(tiny_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = cached(tiny_folder("flux"), steps_mask="fast", steps_computation_policy="static", max_warmup_steps=8)
    job = jobs_of("flux")[0]
    job = Job(id="j", model="m", group="m", params=job.params | {"num_inference_steps": 28}, seed=0)
    _, events = serve(made, [job], monkeypatch)
    assert (usage(events["j"]).steps_computed, usage(events["j"]).steps_skipped) == (11, 17)


def test_taylorseer_forecasts(tiny_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = jobs_of("flux")[1:2]
    plain, _ = serve(cached(tiny_folder("flux")), jobs, monkeypatch)
    forecast, events = serve(cached(tiny_folder("flux"), taylorseer_order=1), jobs, monkeypatch)
    assert usage(events[jobs[0].id]).steps_skipped > 0
    assert np.abs(forecast[jobs[0].id] - plain[jobs[0].id]).max() > 1e-6


def test_a_family_that_the_library_does_not_know_is_refused(tiny_folder: Any) -> None:
    with pytest.raises(ConfigError, match=r"no adapter for SD3Transformer2DModel \(transformer\); set kind: none"):
        cached(tiny_folder("sd3"))


def test_more_blocks_than_there_are_is_refused(tiny_folder: Any) -> None:
    with pytest.raises(ConfigError, match=r"Fn_compute_blocks 60 \+ Bn_compute_blocks 1 = 61, but transformer_blocks"):
        cached(tiny_folder("flux"), Fn_compute_blocks=60, Bn_compute_blocks=1)
