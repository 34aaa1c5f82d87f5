"""The Dockerfile, as far as it can be read without a Docker: what it copies, who runs, and that the pods fit it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINES = (ROOT / "docker/Dockerfile").read_text().replace("\\\n", " ").splitlines()
IGNORED = (ROOT / "docker/Dockerfile.dockerignore").read_text().splitlines()


def stages() -> dict[str, tuple[str, list[str]]]:
    """Of each stage what it is from, and its lines."""
    found: dict[str, tuple[str, list[str]]] = {}
    for line in LINES:
        if stage := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            found[stage[2]] = stage[1], []
        elif line and not line.startswith("#"):
            found[list(found)[-1]][1].append(line)
    return found


def lineage(target: str) -> list[str]:
    """The lines of a stage and of those that it is from, the first ones first."""
    base, lines = stages()[target]
    return (lineage(base) if base in stages() else []) + lines


def test_copies_what_is_there() -> None:
    copied = [name for line in stages()["source"][1] if line.startswith("COPY") for name in line.split()[1:-1]]
    assert {"omni_ray", "requirements", "scripts", "pyproject.toml"} <= set(copied)
    for name in copied:
        assert (ROOT / name).exists(), name
        assert f"!{name}" in IGNORED


@pytest.mark.parametrize("build", ["cpu", "gpu"])
def test_image(build: str) -> None:
    lines = lineage(build)
    assert lines[-1] == "USER 1000:1000"
    assert f"COPY --from=build-{build} /opt/omni-ray /opt/omni-ray" in lines
    assert any(f"BUILD={build} " in line and "scripts/setup" in line for line in lineage(f"build-{build}"))
    assert any(line.startswith("ENV PATH=/opt/omni-ray/.venv/bin:") for line in lines)
    pods = (ROOT / "helm/omni-ray/templates/_pod.tpl").read_text()
    assert "runAsUser: 1000" in pods
    assert "/opt/omni-ray/.venv/bin/" in pods


@pytest.mark.parametrize("build", ["cpu", "gpu"])
def test_only_tools_are_taken_away(build: str) -> None:
    def names(lock: str) -> set[str]:
        pins = (ROOT / "requirements" / f"{lock}.txt").read_text().split("\n")
        return {pin.partition("==")[0] for pin in pins if pin}

    assert not names("dev") & names(build)


def test_both_are_of_the_version_that_the_chart_asks_for() -> None:
    version = re.search(r"^appVersion: (.*)$", (ROOT / "helm/omni-ray/Chart.yaml").read_text(), re.MULTILINE)
    assert version
    text = "\n".join(LINES)
    assert {f"omni-ray:{version[1]}-{build}" for build in ("cpu", "gpu")} == set(re.findall(r"omni-ray:\S+", text))
