"""``omni-ray tune MODEL``: every lever measured on this machine, a report, and the YAML of the best profile."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from omni_ray.cli.calibrate import add_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--psnr", type=float, default=32.0, metavar="DB", help="likeness to keep; default: %(default)s")
    parser.add_argument("--output", default="tuning", metavar="FOLDER", help="default: %(default)s")


def tune(arguments: argparse.Namespace) -> int:
    """Write report.html, profile.yaml and calibration.json to the folder."""
    from omni_ray.config.spec import DitGroup
    from omni_ray.tuning.jobs import jobs_of, read_prompts
    from omni_ray.tuning.report import write_report
    from omni_ray.tuning.tune import tune as walk

    group = DitGroup(type="dit", name="tuned", source=arguments.model)
    jobs = jobs_of(group, read_prompts(arguments.prompts), arguments)
    folder = Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    tuning = walk(group, jobs, arguments.psnr, folder.resolve(), _tell)
    write_report(tuning, folder)
    assert tuning.best is not None
    _tell(
        f"best with {arguments.psnr:g} dB: {tuning.best.name}, x{tuning.best.speed_up:.2f}, {tuning.best.psnr:.1f} dB"
    )
    _tell(f"wrote {folder / 'report.html'} and {folder / 'profile.yaml'}")
    return 0


def _tell(line: str) -> None:
    print(line, file=sys.stdout, flush=True)
