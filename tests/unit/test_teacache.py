"""TeaCache in the engine, for each family: what is reused, that nothing leaks from one request to another, and the
decision itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from omni_ray.accel.apply import Accelerators
from omni_ray.accel.cache.apply import apply_cache
from omni_ray.accel.cache.teacache import Kept, TeaCache, warnings_of
from omni_ray.accel.modules import transformers_of
from omni_ray.config.calibration import Curve
from omni_ray.config.catalog import FAMILIES as CATALOG
from omni_ray.config.spec import Batching, Cache
from omni_ray.engine.loop import EngineLoop
from omni_ray.errors import ConfigError
from omni_ray.messages import Event, Job, Snapshot, StepEvent
from tests.lanes import assert_skips_as_alone, run_lanes, save_at_once, usage
from tests.ranks import jobs_of

FAMILIES = ("flux", "flux2", "qwen_image", "hunyuan_image", "z_image", "sd3", "wan", "helios")
IDENTITY = (1.0, 0.0)


def cached(pipe: DiffusionPipeline, spec: Cache) -> Accelerators:
    """Accelerators that can be made for one pipeline again and again."""
    for transformer in transformers_of(pipe).values():
        transformer.__dict__.pop("forward", None)
    return Accelerators(*apply_cache(pipe, spec))


def serve(
    pipe: DiffusionPipeline, jobs: list[Job], threshold: float | None, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, Any], dict[str, list[Event]]]:
    """The pixels and events of the jobs, run side by side; without a cache where ``threshold`` is None."""
    spec = None if threshold is None else Cache(kind="teacache", threshold=threshold, coefficients=IDENTITY)
    loop = EngineLoop(pipe, Batching(max_num_seqs=8), accelerators=cached(pipe, spec) if spec else None)
    return run_lanes(loop, jobs, monkeypatch)


@pytest.mark.parametrize("family", FAMILIES)
def test_lanes_side_by_side_skip_as_they_do_alone(family: str, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, jobs = tiny(family), jobs_of(family)[:5]
    assert_skips_as_alone(lambda some: serve(pipe, some, 1e9, monkeypatch), jobs)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_threshold_that_never_lets_skip_changes_nothing(
    family: str, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, job = tiny(family), jobs_of(family)[1]
    with_cache, events = serve(pipe, [job], 1e-9, monkeypatch)
    without, _ = serve(pipe, [job], None, monkeypatch)
    assert (with_cache[job.id] == without[job.id]).all()
    assert usage(events[job.id]).steps_skipped == 0


def test_first_and_last_step_are_computed_and_skips_are_limited(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    job = jobs_of("flux")[0]
    job = Job(id="j", model="m", group="m", params=job.params | {"num_inference_steps": 12}, seed=0)
    _, events = serve(tiny("flux"), [job], 1e9, monkeypatch)
    computed = [event.computed for event in events["j"] if isinstance(event, StepEvent)]
    assert computed == [True, *[False] * 4, True, *[False] * 4, True, True]
    assert (usage(events["j"]).steps_computed, usage(events["j"]).steps_skipped) == (4, 8)
    assert [each.split(", only")[0] for each in usage(events["j"]).warnings] == [
        "cache teacache: the threshold was never reached"
    ]


def test_each_window_of_a_video_begins_and_ends_with_a_computed_step(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = jobs_of("helios")[0]
    job = Job(id="j", model="m", group="m", params=job.params | {"num_inference_steps": 5, "num_frames": 10}, seed=0)
    _, events = serve(tiny("helios"), [job], 1e9, monkeypatch)
    steps = [event for event in events["j"] if isinstance(event, StepEvent)]
    assert [(event.step, event.num_steps) for event in steps] == [(i, 10) for i in range(1, 11)]
    assert [event.computed for event in steps] == [True, False, False, False, True] * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_another_lane_goes_on_to_the_same_image(family: str, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    save_at_once(monkeypatch)
    job = jobs_of(family)[0]
    job = Job(id="j", model="m", group="m", params=job.params | {"num_inference_steps": 12}, seed=0)
    wanted, events = serve(tiny(family), [job], 1e9, monkeypatch)
    saved = [event for event in events["j"] if isinstance(event, Snapshot)]
    computed = [event.step for event in events["j"] if isinstance(event, StepEvent) and event.computed]
    assert [each.step for each in saved] == [step - 1 for step in computed if 1 < step < 12]
    for snapshot in saved:
        made, after = serve(tiny(family), [dataclasses.replace(job, resume=snapshot.data)], 1e9, monkeypatch)
        assert (made["j"] == wanted["j"]).all()
        assert usage(after["j"]).steps_skipped == usage(events["j"]).steps_skipped
        assert usage(after["j"]).steps_computed == usage(events["j"]).steps_computed


def test_a_step_that_runs_out_of_memory_is_decided_about_once(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, (job, *_) = tiny("flux"), jobs_of("flux")
    jobs = [Job(id=str(i), model="m", group="m", params=job.params, seed=i) for i in range(3)]
    compute = TeaCache.compute

    def out_of_memory(self: TeaCache, name: str, kept: Any, sizes: Any, run: Any) -> Any:
        if len(kept) > 1:
            raise torch.OutOfMemoryError
        return compute(self, name, kept, sizes, run)

    monkeypatch.setattr(TeaCache, "compute", out_of_memory)
    _, events = serve(pipe, jobs, 1e-9, monkeypatch)
    assert [usage(events[job.id]).steps_skipped for job in jobs] == [0, 0, 0]


def test_estimates_add_up_to_the_threshold() -> None:
    cache = TeaCache({}, {}, threshold=0.25, max_consecutive_skips=4)
    kept = Kept(residuals=[(None,)])
    decisions = [cache._decide(Curve(coefficients=IDENTITY), kept, 0.1, end=False) for _ in range(6)]
    assert decisions == [True, True, False, True, True, False]
    assert warnings_of([kept, Kept(ended_by={"limit"})]) == []
    assert cache._decide(Curve(coefficients=IDENTITY), kept, 0.0, end=True) is False
    assert cache._decide(Curve(coefficients=IDENTITY), kept, None, end=False) is False


def test_the_polynomial_is_numpys() -> None:
    coefficients = CATALOG["FluxTransformer2DModel"].teacache_coefficients
    for x in (0.0, 0.05, 0.3):
        assert Curve(coefficients=coefficients)(x) == pytest.approx(float(np.polyval(coefficients, x)))


@pytest.mark.parametrize(
    ("family", "spec", "advice"),
    [
        ("wan", {}, "no polynomial is known for transformer, transformer_2"),
        ("wan", {"coefficients": IDENTITY}, ""),
        ("flux", {}, ""),
        ("flux", {"kind": "both", "cache_dit": {"Fn_compute_blocks": 1}}, "measure each alone first"),
    ],
)
def test_the_log_advises(
    family: str, spec: dict[str, Any], advice: str, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    log = SimpleNamespace(warning=lambda text, *args: told.append(text % args))
    monkeypatch.setattr("omni_ray.accel.cache.apply.logger", log)
    cached(tiny(family), Cache.model_validate({"kind": "teacache"} | spec))
    assert len(told) == bool(advice)
    assert advice in "".join(told)


def test_an_unknown_family_is_refused() -> None:
    class Pipe:
        components = {"transformer": torch.nn.Linear(1, 1)}  # noqa: RUF012

    with pytest.raises(ConfigError, match=r"Linear \(transformer\) is not among the families"):
        apply_cache(Pipe(), Cache(kind="teacache"))  # type: ignore[arg-type]


def test_the_checkpoint_is_as_it_was(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny("flux")
    names = list(pipe.transformer.state_dict())
    serve(pipe, jobs_of("flux")[:1], 1e9, monkeypatch)
    assert list(pipe.transformer.state_dict()) == names


def test_limits_change_while_the_engine_runs(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, job = tiny("flux"), jobs_of("flux")[1]
    spec = Cache(kind="teacache", threshold=1e9, coefficients=IDENTITY)
    loop = EngineLoop(pipe, Batching(), accelerators=cached(pipe, spec))
    loop.set_cache(None, 1)
    _, events = run_lanes(loop, [job], monkeypatch)
    assert usage(events[job.id]).steps_skipped == 2
    loop = EngineLoop(pipe, Batching(), accelerators=cached(pipe, spec))
    loop.set_cache(1e-9, None)
    _, events = run_lanes(loop, [job], monkeypatch)
    assert usage(events[job.id]).steps_skipped == 0
    with pytest.raises(ConfigError, match="this group has no TeaCache"):
        EngineLoop(pipe, Batching()).set_cache(0.5, None)
