"""`omni-ray calibrate` and `tune` on the demo model: a curve that fits, a share of skips that holds on other prompts,
and a profile that can be served."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omni_ray.cli import main
from omni_ray.config.calibration import Calibration, Curve, Expected, read_calibration
from omni_ray.config.load import load_file
from omni_ray.config.spec import DitGroup
from omni_ray.demo import scenes
from omni_ray.demo.image_model import DEFAULTS
from omni_ray.errors import ConfigError
from omni_ray.messages import Job
from omni_ray.tuning import tune as tuning
from omni_ray.tuning.calibrate import Trace, fit, predict
from omni_ray.tuning.likeness import psnr
from omni_ray.tuning.measure import measure
from omni_ray.tuning.tune import _axes

GROUP = DitGroup(type="dit", name="m", source="demo:image")


def captions(first: int, last: int) -> list[str]:
    return [scene.caption() for scene in scenes.held_out_scenes(last)[first:]]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(captions(0, 3)) + "\n\n")
    return file


def run(*arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert not ended.value.code, ended.value.code


@pytest.mark.slow
def test_a_calibration_holds_on_other_prompts(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "calibration.json"
    arguments = ["--prompts", str(prompts), "--num-inference-steps", "20", "--psnr", "40", "--output", str(file)]
    run("calibrate", "demo:image", *arguments, "--thresholds", "0.15")
    printed = capsys.readouterr().out
    assert "40 dB: threshold 0.15" in printed
    assert f"cache: {{kind: teacache, calibration: {file}, quality: {{psnr: 40}}}}" in printed
    assert file.with_suffix(".png").stat().st_size > 10_000
    found = read_calibration(str(file))
    assert (found.curves["transformer"].r2 or 0) >= 0.9
    (expected,) = found.expected
    assert expected.skipped > 0.2
    jobs = [
        Job(id=str(i), model="m", group="m", params={**DEFAULTS, "prompt": prompt}, seed=100 + i)
        for i, prompt in enumerate(captions(10, 13))
    ]
    cache = {"kind": "teacache", "calibration": str(file), "quality": {"psnr": 40}}
    measured = measure(GROUP, {"cache": cache}, jobs)
    assert measured.skipped == pytest.approx(expected.predicted, abs=0.1)


@pytest.mark.thorough
def test_a_tuning_ends_with_a_profile(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "CACHE_DIT", ({"Fn_compute_blocks": 60, "residual_diff_threshold": 0.2},))
    folder = tmp_path / "tuned"
    run("tune", "demo:image", "--prompts", str(prompts), "--num-inference-steps", "8", "--output", str(folder))
    printed = capsys.readouterr().out
    assert "Cache-DiT 0.2" in printed
    assert "refused: cache.cache_dit: Fn_compute_blocks 60" in printed
    page = (folder / "report.html").read_text()
    assert page.count("<img") > 20
    assert "none, again" in page
    (group,) = load_file(folder / "profile.yaml").omni_applications[0].args.groups
    assert group.source == "demo:image"


@pytest.mark.slow
def test_ranks_are_measured_as_one_is() -> None:
    jobs = [
        Job(id=str(i), model="m", group="m", params={**DEFAULTS, "prompt": prompt, "num_inference_steps": 2}, seed=i)
        for i, prompt in enumerate(captions(0, 2))
    ]
    alone, gang = measure(GROUP, {}, jobs), measure(GROUP, {"parallel": {"ulysses": 2}}, jobs)
    assert psnr(alone.images, gang.images) > 60
    assert gang.seconds > 0
    with pytest.raises(ConfigError, match=r"quantization.kind 'fp8' needs a GPU"):
        measure(GROUP, {"parallel": {"ulysses": 2}, "quantization": {"kind": "fp8"}}, jobs)


def test_a_model_is_spread_over_as_many_gpus_as_a_power_of_two() -> None:
    assert [list(_axes(num)) for num in (0, 1)] == [[], []]
    assert list(_axes(3)) == [{"ulysses": 2}, {"tensor": 2}, {"cfg": 2}]
    assert {"cfg": 2, "ulysses": 4} in list(_axes(8))


def test_the_curve_nowhere_falls() -> None:
    x = np.linspace(0.0, 1.0, 50)
    curve = fit([Trace(list(x), list(x**2))])
    assert curve.r2 == pytest.approx(1.0)
    assert len(curve.coefficients) == 5
    assert curve(0.5) == pytest.approx(0.25, abs=1e-6)
    assert curve(-5) == curve(0.0)
    assert curve(7.0) == pytest.approx(1.0, abs=1e-6)
    wavy = fit([Trace(list(x), list(np.sin(9 * x)))])
    values = [wavy(each) for each in x]
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(values))


def calibration(**values: Any) -> Calibration:
    return Calibration(
        source="s",
        pipeline="P",
        num_inference_steps=4,
        max_consecutive_skips=2,
        num_prompts=1,
        curves={"transformer": Curve(coefficients=(1.0, 0.0))},
        **values,
    )


def test_skips_are_predicted_as_they_are_decided() -> None:
    traces = {"transformer": [Trace([0.1] * 9)]}
    assert predict(traces, calibration(), 0.05) == 0.0
    assert predict(traces, calibration(), 0.15) == 0.4
    assert predict(traces, calibration(), 9.0) == 0.6


def test_the_threshold_for_a_quality() -> None:
    rows = tuple(
        Expected(threshold=t, predicted=0, skipped=0, psnr=p) for t, p in ((0.1, 50), (0.2, 40), (0.3, 41), (0.4, 30))
    )
    assert calibration(expected=rows).threshold_for(40) == 0.3
    with pytest.raises(ConfigError, match=r"no threshold of the calibration kept 60 dB, the best 50\.0"):
        calibration(expected=rows).threshold_for(60)


def test_files_that_are_no_calibration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_calibration(str(tmp_path / "none"))
    (tmp_path / "other").write_text(json.dumps({"a": 1}))
    with pytest.raises(ConfigError, match="is no file of `omni-ray calibrate`"):
        read_calibration(str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "/none"], "--prompts: /none cannot be read"),
        (["--prompts", "PROMPTS", "--size", "100x256"], "multiples of 16"),
        (["--prompts", "PROMPTS", "--size", "large"], "--size 'large' is no size; write it as 1024x1024"),
    ],
)
def test_what_is_wrong_is_said(arguments: list[str], message: str, prompts: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["calibrate", "demo:image", *[str(prompts) if each == "PROMPTS" else each for each in arguments]])
    assert message in str(ended.value.code)
