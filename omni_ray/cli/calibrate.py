"""``omni-ray calibrate MODEL``: TeaCache's curve for a model, from a few prompts, as a file that a YAML can name."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from omni_ray.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--thresholds", type=float, nargs="+", default=[], help="to try; default: by what they skip")
    parser.add_argument("--max-consecutive-skips", type=int, default=4)
    parser.add_argument("--psnr", type=float, metavar="DB", help="say which threshold keeps so many dB")
    parser.add_argument("--output", default="calibration.json", metavar="FILE", help="default: %(default)s")


def add_model(parser: argparse.ArgumentParser) -> None:
    """The arguments that say what is to be drawn."""
    parser.add_argument("model", metavar="MODEL", help="a folder, a hub id, or demo:image")
    parser.add_argument("--prompts", required=True, metavar="FILE", help="one prompt a line; a dozen is enough")
    parser.add_argument("--num-inference-steps", type=int, metavar="N", help="default: the model's own")
    parser.add_argument("--size", metavar="WxH", help="default: the model's own")
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--negative-prompt")


def calibrate(arguments: argparse.Namespace) -> int:
    """Write the file and a plot beside it, and print what to expect of each threshold."""
    from omni_ray.config.spec import Cache, DitGroup
    from omni_ray.tuning.calibrate import calibrate as measure
    from omni_ray.tuning.jobs import jobs_of, read_prompts
    from omni_ray.tuning.plots import plot_calibration

    skips = arguments.max_consecutive_skips
    cache = Cache(kind="teacache", max_consecutive_skips=skips)
    group = DitGroup(type="dit", name="calibrated", source=arguments.model, cache=cache)
    jobs = jobs_of(group, read_prompts(arguments.prompts), arguments)
    found, traces = measure(group, jobs, _tell, arguments.thresholds)
    output = Path(arguments.output).resolve()
    output.write_text(found.model_dump_json(indent=1) + "\n")
    plot_calibration(found, traces, output.with_suffix(".png"))
    chosen = "threshold: 0.2"
    if arguments.psnr is not None:
        try:
            _tell(f"{arguments.psnr:g} dB: threshold {found.threshold_for(arguments.psnr):g}")
            chosen = f"quality: {{psnr: {arguments.psnr:g}}}"
        except ConfigError as error:
            _tell(error.message)
    _tell(f"wrote {output} and {output.with_suffix('.png')}; in the YAML:")
    _tell(f"  cache: {{kind: teacache, calibration: {output}, {chosen}}}")
    return 0


def _tell(line: str) -> None:
    print(line, file=sys.stdout, flush=True)
